"""Limit a token to the models that its scope names as `model:<name>`; a scope without such names allows all models.

HAProxy cannot search for a word that it reads from the path, but a pattern can refer to its own match. So the path's
model is put in front of the scope, and one rule serves all models. HAProxy reads a scope that is a list as missing;
replicas check those. Ray's dashboard does not check scopes, and its users can do anything to every model. So the
dashboard refuses a token that mentions a model anywhere.
"""

from __future__ import annotations

from cluster.security.tokens.verification import MODEL_SCOPE
from serve_apps.edge.haproxy.answers import refuse

_MODEL_IN_SCOPE = r"(?s)^(?P<model>[^ ]+) (.* )?model:(?P=model) "


def rules(*, claim: str) -> str:
    """Return rules that refuse with 403 a model that the token's scope does not name.

    Args:
        claim: the issuer's name of the scope claim.
    """
    lines = [
        f"    http-request set-var(txn.scope) var(txn.claims),json_query('$.{claim}')",
        "    acl scoped var(txn.scope) -m reg (^|\\ )model:",
        f"    {refuse(403, 'A token that is limited to some models cannot open the dashboard.')} "
        f"if dashboard {{ var(txn.claims) -m sub -- {MODEL_SCOPE} }}",
        '    http-request set-var-fmt(txn.asked_in_scope) "%[var(txn.model)] %[var(txn.scope)] " if scoped',
        f"    {refuse(403, 'The scope of your token does not name this model.')} "
        f"if {{ var(txn.model) -m found }} scoped !{{ var(txn.asked_in_scope) -m reg -- '{_MODEL_IN_SCOPE}' }}",
    ]
    return "\n".join(lines)
