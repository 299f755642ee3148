"""The rollouts that ran when the ledger answered last: in memory, and in a file for a controller that starts again."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster.known_fields import known_fields
from cluster.security.private_file import is_private
from cluster.security.tokens.issuer import replace_private_file
from serve_apps.rollout.history import History, PolicyRun

LOG = logging.getLogger("falaj.rollouts")


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownRollout:
    """A running rollout with a policy, as the last known event of its model left it."""

    model: str
    champion: int | None
    run: PolicyRun


class KnownRollouts:
    """The running rollouts with a policy. Only the owner can read the file.

    Args:
        file: The file. Without a valid one, no rollout is known.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self.rollouts = self._read()
        self._written = self.rollouts

    def learn(self, histories: Mapping[str, History]) -> None:
        """Take the histories that the ledger has now. On a full disk, they are only in memory."""
        self.rollouts = tuple(
            KnownRollout(model=model, champion=history.champion, run=replace(history.run, last=None))
            for model, history in sorted(histories.items())
            if history.run is not None and not history.run.is_shadow  # no client gets a shadow's answer
        )
        if self.rollouts == self._written:
            return
        try:
            content = json.dumps([asdict(one) for one in self.rollouts])
            replace_private_file(self._file, content.encode())
            self._written = self.rollouts
        except OSError as error:
            LOG.warning("the running rollouts cannot be stored for an outage of the ledger: %s", error)

    def _read(self) -> tuple[KnownRollout, ...]:
        try:
            with self._file.open("rb") as file:
                if not is_private(os.fstat(file.fileno()), own=os.geteuid()):
                    raise ValueError("other users can write it")
                stored = json.loads(file.read())
            return tuple(
                KnownRollout(
                    model=one["model"],
                    champion=one["champion"],
                    run=PolicyRun(**known_fields(PolicyRun, one["run"] | {"last": None})),
                )
                for one in stored
            )
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, TypeError, KeyError) as error:
            LOG.warning("%s is not used: %s", self._file, error)
            return ()
