"""`python -m feature_jobs.rotate_keys view=v [rotate=false] [rewrite=false]`: newer keys for a view, and its data under
them.

After a rotation new files are under the new versions; the old ones go on reading what is there, so nothing has to be
rewritten for a routine change. Rewriting is for a key that may have leaked: every file of the table's newest version
and of the quarantine is written anew. Parquet keeps its wrapped keys in each file's footer, so a file cannot be given
another key without being written. Online values follow at the next materialisation. Killed, it is run again, with
`rotate=false` if the new versions are there already.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import KeysRotated, Subject
from cluster.security.acting import act
from cluster.security.authorization.policy import Action, Resource
from cluster.security.encryption.access import protected_files
from cluster.security.keys.access import key_store
from cluster.security.keys.store import KeyInfo, KeyNotFound, KeyStore
from cluster.session import require_record
from cluster.settings import PlatformConfig
from cluster.storage import layout, list_files
from feature_jobs.batches.judging import profile_place
from feature_jobs.compact import newest, record
from feature_jobs.store.catalog.protection import (
    quarantine_place,
    quarantine_protection,
    view_key_names,
    view_resources,
)
from feature_jobs.store.catalog.specifications import view_spec
from feature_jobs.store.offline.compaction import as_target, rewrite


@dataclass(kw_only=True, slots=True)
class RotateKeysConfig(PlatformConfig):
    """Which view, and how far."""

    definitions: str = "feature_jobs.census"
    """Named for symmetry with the other commands: the view is read as it was applied."""
    view: str = "???"
    rotate: bool = True
    """Make new versions of the view's keys."""
    rewrite: bool = True
    """Write its table and quarantine anew under the newest versions."""

    def __post_init__(self) -> None:
        if not (self.rotate or self.rewrite):
            raise ValueError("rotate and rewrite are both false: there is nothing to do.")


@job("rotate_keys", RotateKeysConfig, timed=True)
def main(config: RotateKeysConfig) -> None:
    """Rotate one view's keys."""
    ledger = open_ledger(config)
    actor = act(config, require_record(config), ledger, entrypoint="feature_jobs.rotate_keys")
    view, region = view_spec(ledger, config.view), config.cluster.region
    actor.check(Action.write_features, *view_resources(view, region=region))
    store = key_store(actor.access)
    infos = present(view_key_names(view), store)
    names = [info.name for info in infos]
    actor.check(Action.manage_keys, *(Resource.of_key(info) for info in infos))
    if config.rotate:
        ledger.require_known(Subject.key)
        rotate(view.name, names, store, ledger, actor=actor.name)
        print(f"view {view.name}: {len(names)} keys have a new version")
    if config.rewrite:
        pinned = newest(config, view, actor)
        rewrite(pinned, as_target(pinned), {file.bucket for file in pinned.files})
        files = protected_files(actor.access)
        quarantine = layout(config.storage).quarantine(view.name)
        quarantined = list_files(quarantine, ".parquet")
        protection = quarantine_protection(view.name)
        for uri in quarantined:
            batch = uri.rsplit("/", 1)[-1].removesuffix(".parquet")
            place = quarantine_place(view.name, batch)
            files.reprotect(uri, uri, protection, was=protection, place=place, unplaced=True)
        for uri in list_files(f"{quarantine}/profiles", ".parquet"):
            files.reprotect(uri, uri, protection, was=protection, place=profile_place(view.name, uri))
        replaced = record(ledger, view.name, pinned.uri, actor=actor.name)
        print(f"view {view.name}: {replaced} files of the table and {len(quarantined)} quarantined rewritten")


def present(names: list[str], store: KeyStore) -> list[KeyInfo]:
    """The keys that there are: a view that was applied under an earlier release may lack those of what came later."""
    infos = []
    for name in names:
        with contextlib.suppress(KeyNotFound):
            infos.append(store.info(name))
    return infos


def rotate(view: str, names: list[str], store: KeyStore, ledger: Ledger, *, actor: str) -> None:
    """Make a new version of each key, and say so before the next one: killed midway, the ledger knows of every one but
    perhaps the last."""
    for name in names:
        ledger.append(KeysRotated(view=view, keys={name: store.rotate(name)}), actor=actor)


if __name__ == "__main__":
    main()
