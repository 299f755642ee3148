"""Which models a token may ask: those that its scope names as `model:<name>`, and all where it names none.

HAProxy cannot look for a word that it reads from the path, so there is a rule for each model that is deployed; a model
without a rule is out of every such scope. A scope that is a list HAProxy reads as none: replicas know better. Ray's
dashboard does not, and whoever gets there can do anything to every model, so there a token that speaks of a model
anywhere is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from cluster.security.tokens import MODEL_SCOPE
from serve_apps.edge.answers import refuse


def rules(models: Iterable[str], *, claim: str) -> str:
    """Rules that refuse with 403 a model that the token's scope leaves out.

    Args:
        models: all that are deployed.
        claim: the issuer's name for the scope.
    """
    lines = [
        f"    http-request set-var(txn.scope) var(txn.claims),json_query('$.{claim}')",
        "    acl scoped var(txn.scope) -m reg (^|\\ )model:",
        f"    {refuse(403, 'A token for some models is none for the dashboard.')} "
        f"if dashboard {{ var(txn.claims) -m sub -- {MODEL_SCOPE} }}",
        *(_within(model) for model in models),
        f"    {refuse(403, 'The scope of your token does not name this model.')} "
        "if { var(txn.model) -m found } scoped !{ var(txn.in_scope) -m bool }",
    ]
    return "\n".join(lines)


def _within(model: str) -> str:
    word = f"(^|\\ )model:{re.escape(model)}(\\ |$)".replace("\\.", "[.]").replace("\\-", "-")
    return (
        f"    http-request set-var(txn.in_scope) bool(true) if scoped {{ var(txn.model) -m str -- {model} }} "
        f"{{ var(txn.scope) -m reg -- {word} }}"
    )
