"""The traffic split: rules that choose a request's arm, backend and variant, and tell the replica about them."""

from __future__ import annotations

from cluster.records.unit_hash import DIGITS, NO_ROLLOUT
from serve_apps.edge.haproxy.answers import NO_HEALTHY_REPLICA, refuse
from serve_apps.edge.haproxy.routes import BY_SUBJECT
from serve_apps.replica.edge_headers import (
    ARM,
    ARRIVED,
    PROOF,
    PROOF_VARIABLE,
    REQUEST_ID,
    ROLLOUT,
    UNIT_HASH,
    UNIT_KEY_VARIABLE,
    VARIANT,
)
from serve_apps.rollout.assignment import BUCKETS, CHAMPION_VARIANT, PREDECESSOR_VARIANT, Arm

OUTCOMES_APP, FEATURES_APP = "outcomes", "features"
_FEATURE_PATHS = "/v1/features:read /v1/features:push"
_HOP_BY_HOP = ("upgrade", "keep-alive", "proxy-connection", "te", "trailer", "http2-settings")
"""Hop-by-hop headers (RFC 9110, 7.6.1), which must not be forwarded; HAProxy handles `Connection` itself. Only Ray's
dashboard accepts protocols other than plain HTTP."""


def rules(*, map_file: str) -> str:
    """Return all rules of the split. They set `txn.backend`, and the path that the replica gets.

    Args:
        map_file: file with the map entry of each model (see `routes.entry`).
    """
    return "\n".join(
        (
            _read_route(map_file),
            _choose_arm(),
            _choose_backend(),
            _replica_headers(),
            "    http-request set-path /%[var(txn.backend)]%[path]",
        )
    )


def _read_route(map_file: str) -> str:
    """Read the model's map entry into variables. At first, backend and variant are those of the champion."""
    return f"""    acl by_model var(txn.model) -m found
    http-request set-var(txn.route) var(txn.model),map_str({map_file}) if by_model
    {refuse(404, "No such model is deployed.")} if by_model !{{ var(txn.route) -m found }}
    http-request set-var(txn.backend) str({OUTCOMES_APP}) if {{ path /v1/outcomes }}
    http-request set-var(txn.backend) str({FEATURES_APP}) if {{ path {_FEATURE_PATHS} }}
    http-request set-var(txn.backend) var(txn.route),field(1,|) if by_model
    http-request set-var(txn.variant) str({CHAMPION_VARIANT}) if by_model
    http-request set-var(txn.rollout) var(txn.route),field(4,|) if by_model
    http-request set-var(txn.salt) var(txn.route),field(5,|) if by_model
    http-request set-var(txn.below) var(txn.route),field(6,|) if by_model
    http-request set-var(txn.from) var(txn.route),field(7,|) if by_model"""


def _choose_arm() -> str:
    """Compute the unit's bucket, arm and hash.

    The unit is the header `X-Unit-ID`, or the token's subject, which `token_checks` has verified. HAProxy reads a
    subject that is `null`, a number or empty as some text, but it names no unit.
    `rollout.assignment.assign` gives the same arms, and `cluster.records.unit_hash` the same hashes.
    """
    return f"""    {refuse(400, "Send only one X-Unit-ID header.")} if by_model {{ req.fhdr_cnt(x-unit-id) gt 1 }}
    acl by_subject var(txn.route) -m sub |{BY_SUBJECT}
    http-request set-var(txn.unit) req.fhdr(x-unit-id) if by_model !by_subject
    acl names_subject var(txn.claims) -m reg '"sub"[[:space:]]*:[[:space:]]*"[^"]'
    http-request set-var(txn.unit) var(txn.principal) if by_model by_subject names_subject
    acl has_unit var(txn.unit) -m len gt 0
    http-request set-var(txn.arm) str({Arm.none}) if by_model
    http-request set-var(txn.arm) str({Arm.outside}) if has_unit
    http-request set-var(txn.rollout_key) var(txn.rollout),hmac(sha256,"${{{UNIT_KEY_VARIABLE}}}"),base64 if has_unit
    http-request set-var(txn.unit_hash) var(txn.unit),hmac(sha256,txn.rollout_key),hex,bytes(0,{DIGITS}) if has_unit
    http-request set-var(txn.bucket) var(txn.salt),concat(:,txn.unit),xxh32(0),mod({BUCKETS}) if has_unit
    http-request set-var(txn.arm) str({Arm.treatment}) if has_unit {{ var(txn.bucket),sub(txn.below) -m int lt 0 }}
    http-request set-var(txn.arm) str({Arm.control}) if has_unit !{{ var(txn.bucket),sub(txn.from) -m int lt 0 }}"""


def _choose_backend() -> str:
    """For a request of the other version's arm, set its backend, or the champion's if it has no healthy replica.

    This arm is the treatment, and in a holdback control. After a promotion without a holdback, no arm has another
    version, and the variant is the champion's.
    """
    return f"""    acl holdback var(txn.route),field(3,|) -m str {PREDECESSOR_VARIANT}
    acl one_version var(txn.route),field(3,|) -m str {CHAMPION_VARIANT}
    acl of_treatment var(txn.arm) -m str {Arm.treatment}
    acl of_control var(txn.arm) -m str {Arm.control}
    http-request set-var(txn.treatment) var(txn.route),field(2,|) if of_treatment !holdback !one_version
    http-request set-var(txn.treatment) var(txn.route),field(2,|) if of_control holdback
    acl treated var(txn.treatment) -m found
    acl treatable var(txn.treatment),nbsrv -m int gt 0
    http-request set-var(txn.backend) var(txn.treatment) if treated treatable
    http-request set-var(txn.variant) var(txn.route),field(3,|) if treated treatable
    http-request set-var(txn.fallback) bool(true) if treated !treatable
    {refuse(503, NO_HEALTHY_REPLICA)} unless {{ var(txn.backend),nbsrv -m int gt 0 }}"""


def _replica_headers() -> str:
    """Set the headers that tell a replica about the request, and remove hop-by-hop headers.

    Every request gets all these headers, so that a trailer cannot add a missing one.
    """
    values = {
        PROOF: f"${{{PROOF_VARIABLE}}}",
        REQUEST_ID: "%[unique-id]",
        ARRIVED: "%[date(0,us)]",
        VARIANT: "%[var(txn.variant)]",
        ARM: "%[var(txn.arm)]",
        ROLLOUT: "%[var(txn.of_rollout)]",
        UNIT_HASH: "%[var(txn.unit_hash)]",
    }
    lines = [
        *(f"    http-request del-header {name}" for name in _HOP_BY_HOP),
        f"    http-request set-var(txn.of_rollout) var(txn.rollout) unless {{ var(txn.rollout) -m str {NO_ROLLOUT} }}",
        *(f'    http-request set-header {name} "{value}"' for name, value in values.items()),
    ]
    return "\n".join(lines)
