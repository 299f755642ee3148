"""Read and write a view's quarantine: one protected Parquet file per batch, and beside it one profile per batch.

A file is encrypted with the quarantine's key and bound to its batch. So a copy under another batch's name cannot be
read. Files of earlier releases are not bound to a batch; they can still be read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import pyarrow as pa

from cluster.security.encryption.access import protected_files
from cluster.security.encryption.parquet import Protection
from cluster.security.keys.access import KeyAccess
from cluster.storage import exists, file_system, list_files
from feature_jobs.store.catalog.protection import quarantine_aad, quarantine_protection
from feature_jobs.store.types.batch_profile import Profile
from feature_jobs.store.types.schema import INGESTED, SEQ

COLUMNS = ("reason", "raw", INGESTED, SEQ)
"""Columns of a quarantine file, in order. `raw` is the source row as JSON."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarantineFiles:
    """The quarantine files and profiles of one view."""

    folder: str
    view: str
    access: KeyAccess

    def path(self, batch: str) -> str:
        """Return the path of a batch's quarantine file."""
        return f"{self.folder}/{batch}.parquet"

    def batches(self) -> list[str]:
        """Return the batches that have a quarantine file."""
        return [_stem(path) for path in list_files(self.folder, ".parquet")]

    def exists(self, batch: str) -> bool:
        """Return whether a batch has a quarantine file."""
        return exists(self.path(batch))

    def read(self, batch: str) -> pa.Table:
        """Return a batch's quarantined rows.

        Raises:
            ProtectedFileCorrupt: the file was altered, or belongs to another batch.
        """
        return protected_files(self.access).read(
            self.path(batch),
            protection=self._protection,
            place=quarantine_aad(self.view, batch),
            unplaced=True,
        )

    def write(self, batch: str, rows: pa.Table) -> None:
        """Write a batch's quarantined rows, and replace earlier ones."""
        self._write(rows, self.path(batch), batch)

    def write_pending(self, batch: str, replay_id: str, rows: pa.Table) -> None:
        """Write the rows that a replay leaves in quarantine to a separate file, for `publish_pending`."""
        self._write(rows, self._pending_path(replay_id), batch)

    def publish_pending(self, batch: str, replay_id: str) -> None:
        """Replace a batch's quarantine file by the pending file of a replay."""
        fs, path = file_system(self.path(batch))
        fs.mv(file_system(self._pending_path(replay_id))[1], path)

    def remove(self, batch: str) -> None:
        """Remove a batch's quarantine file."""
        fs, path = file_system(self.path(batch))
        fs.rm(path)

    def read_profile(self, batch: str) -> Profile:
        """Return a batch's profile."""
        path = self._profile_path(batch)
        table = protected_files(self.access).read(
            path, protection=self._protection, place=self._profile_aad(batch)
        )
        return Profile.from_json(table["profile"][0].as_py())

    def write_profile(self, batch: str, profile: Profile) -> None:
        """Write a batch's profile, and replace an earlier one."""
        protected_files(self.access).write(
            pa.table({"profile": [profile.to_json()]}),
            self._profile_path(batch),
            self._protection,
            place=self._profile_aad(batch),
        )

    def reencrypt(self) -> int:
        """Write all files again under the newest key, and return the number of batches in quarantine."""
        pending = [_stem(path) for path in list_files(f"{self.folder}/pending", ".parquet")]
        batches = self.batches()
        for batch in batches:
            self._reprotect(self.path(batch), quarantine_aad(self.view, batch))
        for path in list_files(f"{self.folder}/profiles", ".parquet"):
            self._reprotect(path, self._profile_aad(_stem(path)))
        self._reencrypt_pending(pending, batches)
        return len(batches)

    @property
    def _protection(self) -> Protection:
        return quarantine_protection(self.view)

    def _reencrypt_pending(self, pending: list[str], batches: list[str]) -> None:
        """Write the pending files of killed replays again, and delete those that no replay can publish any more.

        A pending file is bound to its batch, but its name has only the replay id. Each batch with rows in quarantine
        has one possible replay id, which its next replay looks for.
        """
        if not pending:
            return
        batch_of = {replay_id_of(batch, self.read(batch)): batch for batch in batches}
        for replay_id in pending:
            path = self._pending_path(replay_id)
            if replay_id in batch_of:
                self._reprotect(path, quarantine_aad(self.view, batch_of[replay_id]))
            elif exists(path):  # a replay may have published it in the meantime
                fs, name = file_system(path)
                fs.rm(name)

    def _reprotect(self, path: str, aad: str) -> None:
        protection = self._protection
        # Only files of earlier releases have no AAD. They get one here.
        protected_files(self.access).reprotect(
            path, path, protection, was=protection, place=aad, unplaced=True
        )

    def _write(self, rows: pa.Table, path: str, batch: str) -> None:
        # A file of an earlier release may lack a column.
        ordered = rows.select([name for name in COLUMNS if name in rows.column_names])
        protected_files(self.access).write(
            ordered, path, self._protection, place=quarantine_aad(self.view, batch)
        )

    def _pending_path(self, replay_id: str) -> str:
        return f"{self.folder}/pending/{replay_id}.parquet"

    def _profile_path(self, batch: str) -> str:
        return f"{self.folder}/profiles/{batch}.parquet"

    def _profile_aad(self, batch: str) -> str:
        return f"{self.view}/profiles/{batch}.parquet"


def replay_id_of(batch: str, file: pa.Table) -> str:
    """Return the id of a batch's next replay. It stays the same until a row is removed from the quarantine."""
    rows = ",".join(map(str, sorted(file[SEQ].to_pylist())))
    return hashlib.sha256(f"replay:{batch}:{rows}".encode()).hexdigest()[:16]


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[-1].removesuffix(".parquet")
