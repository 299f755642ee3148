"""A push log as releases before December 2026 wrote it: one LMDB database per view."""

from __future__ import annotations

import hashlib
import os
import struct
import time
from pathlib import Path
from typing import Any

import lmdb
import msgpack

from cluster.security.encryption.envelope import ValueCipher, value_aad
from cluster.security.keys.store import KeyStore
from feature_jobs.store.catalog.protection import push_key
from feature_jobs.store.streaming.push_log import PushRecord, _to_ipc


def append(
    folder: Path, view: str, keys: KeyStore, idempotency_key: str, record: PushRecord, answer: dict[str, Any]
) -> None:
    """Append one push."""
    folder.mkdir(parents=True, exist_ok=True)
    cipher, wrapped = ValueCipher.create(keys, push_key(view))
    name, digest = os.urandom(8), hashlib.sha256(idempotency_key.encode()).digest()
    key = b"i" + hashlib.blake2b(idempotency_key.encode(), digest_size=16).digest()
    content = msgpack.packb([record.view_version, _to_ipc(record.good), _to_ipc(record.bad)])
    number = struct.pack(">Q", record.first)
    with lmdb.open(str(folder), map_size=1 << 26) as environment, environment.begin(write=True) as log:
        log.put(b"k" + name, wrapped.encode())
        sealed = cipher.encrypt(content, value_aad(f"push/{view}", number))
        log.put(b"r" + number, msgpack.packb([record.rows, name, sealed]))
        log.put(key, msgpack.packb([record.first, digest, answer]))
        log.put(b"t" + struct.pack(">d", time.time()) + key, b"")
        log.put(b"next", struct.pack(">Q", record.first + record.rows))
