"""The access record: HAProxy's log line for each request with a valid token."""

from __future__ import annotations

_FIELDS: dict[str, str] = {
    "time": "%Ts.%ms",
    "ended_ms": "%[date(0,ms)]",
    "request_id": '"%ID"',
    "model": '"%[var(txn.model),json(utf8s)]"',
    "action": '"%[var(txn.action)]"',
    "principal": '"%[var(txn.principal),bytes(0,400),json(utf8s)]"',
    "path": '"%[var(txn.path),bytes(0,300),json(utf8s)]"',
    "rollout": '"%[var(txn.rollout)]"',
    "arm": '"%[var(txn.arm)]"',
    "below": '"%[var(txn.below)]"',
    "variant": '"%[var(txn.variant)]"',
    "fallback": '"%[var(txn.fallback)]"',
    "unit_hash": '"%[var(txn.unit_hash)]"',
    "status": "%ST",
    "latency_ms": "%Ta",
    "prediction_id": '"%[var(txn.prediction_id),json(utf8s)]"',
    "termination": '"%ts"',
}
LOG_FORMAT = "{" + ",".join(f'"{name}":{value}' for name, value in _FIELDS.items()) + "}"
"""`ended_ms` is the time at which the answer ended, in Unix milliseconds; on a connection that is used again, `time` is
when the request before it ended. `below` is the split's bound by which the arm was chosen.

Values that a client chooses are shortened, because HAProxy cuts a record after 4,096 bytes, and escaping can turn
one byte into six (`\\u0001`)."""
