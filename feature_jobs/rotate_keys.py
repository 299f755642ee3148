"""`python -m feature_jobs.rotate_keys view=v [rotate=false] [rewrite=false]`: rotate a view's keys, rewrite its data.

After a rotation, new files are encrypted with the new key versions. Existing files are still read with the old key
versions, so a routine rotation needs no rewrite.

Rewrite if a key may have leaked. Then every file of the table's newest version and of the quarantine is written again.
Parquet stores the wrapped keys in each file's footer, so a file cannot get another key without a rewrite. Online values
get the new keys at the next materialisation.

If the command is killed, run it again. Add `rotate=false` if the new key versions exist already.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from cluster.entrypoint import job
from cluster.ledger import Ledger, open_ledger
from cluster.ledger.events import KeysRotated, Subject
from cluster.security.acting import create_actor
from cluster.security.authorization.policy import Action, Resource
from cluster.security.keys.access import key_store
from cluster.security.keys.store import KeyInfo, KeyNotFound, KeyStore
from cluster.session import require_running_cluster
from cluster.settings import PlatformConfig
from cluster.storage import layout
from feature_jobs.compact import newest_snapshot, record_rewrites
from feature_jobs.store.catalog.protection import view_key_names, view_resources
from feature_jobs.store.catalog.specifications import view_spec
from feature_jobs.store.offline.compaction import current_target, rewrite
from feature_jobs.view_tables import view_quarantine


@dataclass(kw_only=True, slots=True)
class RotateKeysConfig(PlatformConfig):
    """Configuration of `feature_jobs.rotate_keys`."""

    definitions: str = "feature_jobs.census"
    """Not used. Other feature commands have this option. The view is read from the ledger."""
    view: str = "???"
    rotate: bool = True
    """Create new versions of the view's keys."""
    rewrite: bool = True
    """Encrypt the view's table and quarantine again with the newest versions of their keys."""

    def __post_init__(self) -> None:
        if not (self.rotate or self.rewrite):
            raise ValueError("rotate and rewrite are both false: there is nothing to do.")


@job("rotate_keys", RotateKeysConfig, timed=True)
def main(config: RotateKeysConfig) -> None:
    """Rotate one view's keys."""
    ledger = open_ledger(config)
    actor = create_actor(
        config, require_running_cluster(config), ledger, entrypoint="feature_jobs.rotate_keys"
    )
    view, region = view_spec(ledger, config.view), config.cluster.region
    actor.check(Action.write_features, *view_resources(view, region=region))
    store = key_store(actor.access)
    infos = existing_keys(view_key_names(view), store)
    names = [info.name for info in infos]
    actor.check(Action.manage_keys, *(Resource.from_key(info) for info in infos))
    if config.rotate:
        ledger.require_known(Subject.key)
        rotate(view.name, names, store, ledger, actor=actor.name)
        print(f"view {view.name}: {len(names)} keys have a new version")
    if config.rewrite:
        pinned = newest_snapshot(config, view, actor)
        rewrite(pinned, current_target(pinned), {file.bucket for file in pinned.files})
        quarantined = view_quarantine(view.name, layout(config.storage), actor.access).reencrypt()
        replaced = record_rewrites(ledger, view.name, pinned.uri, actor=actor.name)
        print(f"view {view.name}: {replaced} files of the table and {quarantined} quarantined rewritten")


def existing_keys(names: list[str], store: KeyStore) -> list[KeyInfo]:
    """Return the keys that exist. A view that an earlier release applied may lack keys that were added later."""
    infos = []
    for name in names:
        with contextlib.suppress(KeyNotFound):
            infos.append(store.info(name))
    return infos


def rotate(view: str, names: list[str], store: KeyStore, ledger: Ledger, *, actor: str) -> None:
    """Create a new version of each key.

    The event is appended before the next key is rotated. So after a kill, at most the last rotation has no event.
    """
    for name in names:
        ledger.append(KeysRotated(view=view, keys={name: store.rotate(name)}), actor=actor)


if __name__ == "__main__":
    main()
