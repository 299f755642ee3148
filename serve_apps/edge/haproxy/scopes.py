"""Which models a token may ask: those that its scope names as `model:<name>`, and all where it names none.

HAProxy cannot look for a word that it reads from the path, but a pattern can refer to what it has matched: so the model
of the path stands in front of the scope, and one rule serves all models. A scope that is a list HAProxy reads as none:
replicas know better. Ray's dashboard does not, and whoever gets there can do anything to every model, so there a token
that speaks of a model anywhere is refused.
"""

from __future__ import annotations

from cluster.security.tokens.verification import MODEL_SCOPE
from serve_apps.edge.haproxy.answers import refuse

_NAMED = r"(?s)^(?P<model>[^ ]+) (.* )?model:(?P=model) "


def rules(*, claim: str) -> str:
    """Rules that refuse with 403 a model that the token's scope leaves out.

    Args:
        claim: the issuer's name for the scope.
    """
    lines = [
        f"    http-request set-var(txn.scope) var(txn.claims),json_query('$.{claim}')",
        "    acl scoped var(txn.scope) -m reg (^|\\ )model:",
        f"    {refuse(403, 'A token for some models is none for the dashboard.')} "
        f"if dashboard {{ var(txn.claims) -m sub -- {MODEL_SCOPE} }}",
        '    http-request set-var-fmt(txn.asked_in_scope) "%[var(txn.model)] %[var(txn.scope)] " if scoped',
        f"    {refuse(403, 'The scope of your token does not name this model.')} "
        f"if {{ var(txn.model) -m found }} scoped !{{ var(txn.asked_in_scope) -m reg -- '{_NAMED}' }}",
    ]
    return "\n".join(lines)
