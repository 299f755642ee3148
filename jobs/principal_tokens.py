"""The principal of a recorded command, and tokens with which a process acts for this principal."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.security.tokens.intent import FILE_VARIABLE, remove_expired, write_intent
from cluster.security.tokens.issuer import TOKEN_TTL_S, mint_token
from cluster.security.tokens.principal import Principal
from cluster.security.tokens.source import INTENTS, RENEW_S
from cluster.security.tokens.verification import MODEL_SCOPE
from cluster.storage import Layout, local


@contextmanager
def renewed_token(places: Layout, *, kind: str, new_token: Callable[[], str]) -> Iterator[dict[str, str]]:
    """Keep a token in a private file, and yield the variable that names the file. A thread renews the token.

    Args:
        places: paths below the storage root.
        kind: first part of the file's name.
        new_token: returns a new token.
    """
    folder = local(places.keys) / INTENTS
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    remove_expired(folder)
    path, ended = folder / f"{kind}-{uuid.uuid4().hex}.jwt", threading.Event()

    def renew_until_ended() -> None:
        while not ended.wait(RENEW_S):
            with contextlib.suppress(OSError):
                write_intent(path, new_token())

    write_intent(path, new_token())
    threading.Thread(target=renew_until_ended, daemon=True, name="token").start()
    try:
        yield {FILE_VARIABLE: str(path)}
    finally:
        ended.set()
        path.unlink(missing_ok=True)


def access_token(places: Layout, principal: Principal) -> str:
    """Return an access token of the development issuer with exactly a principal's rights.

    Commands exchange it for their own intents, so it is for a command that starts other commands.
    """
    models = principal.models
    return mint_token(
        places,
        subject=principal.subject,
        role=principal.role,
        purpose=principal.purpose,
        tenant=principal.tenant,
        scope="" if models is None else " ".join(f"{MODEL_SCOPE}{model}" for model in models),
        ttl_s=TOKEN_TTL_S,
    )
