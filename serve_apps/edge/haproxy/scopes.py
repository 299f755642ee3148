"""Limit a token to the models that its scope names as `model:<name>`. A scope without such names allows all models.

HAProxy cannot search the scope for a model that it has read from the path. But a regular expression can refer to its
own match. So the rules put the path's model in front of the scope, and one rule is enough for all models. If a scope is
a list, HAProxy reads it as missing, and replicas check it.

Ray's dashboard does not check scopes, and a user of the dashboard can do anything to every model. So requests to the
dashboard are refused if the token contains the name of a model anywhere.
"""

from __future__ import annotations

from cluster.security.tokens.verification import MODEL_SCOPE
from serve_apps.edge.haproxy.answers import refuse

_MODEL_IN_SCOPE = r"(?s)^(?P<model>[^ ]+) (.* )?model:(?P=model) "


def rules(*, claim: str) -> str:
    """Return rules that refuse a request with 403 if the token's scope does not allow the model.

    Args:
        claim: the issuer's name for the scope claim.
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
