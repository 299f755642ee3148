"""Logs of predictions and outcomes: one prediction record per HTTP answer, and the outcomes that arrive later.

Replicas write with `segments`, and all readers use `reading`. `location` says where a log is, and `upload` moves closed
segments to a remote storage root. `signature_types` converts a version's rows to the types
of its signature. `matching` joins predictions with their outcomes.

Import the module that you need. The package itself imports nothing, because `reading` and `matching` import Polars and
delta-rs, and processes that only write records do not need them.
"""
