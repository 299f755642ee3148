"""Altered, damaged and hostile bundles are refused in one line that names the part, and nothing is registered."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ArtifactTampered, ConfigError, RefusedError
from cluster.ledger.chain import canonical
from cluster.ledger.checkpoint import ensure_signer
from cluster.ledger.events import ModelExported
from jobs.promotion.archive import ENVELOPE, new_archive
from jobs.promotion.statement import PAYLOAD_TYPE, describe_parts, pre_authentication_encoding
from tests.processes.other_user import NOBODY, needs_root
from tests.samples.installations import Installation
from tests.samples.signatures import of_each_task
from tests.samples.trees import write_trees
from tests.servers.small_disk import fill_disk, mounted_small_disk
from tests.unit.jobs.promotion.test_promotion import INPUTS

PARTS = (
    "card.json",
    "definitions.json",
    "events.jsonl",
    "model/model.json",
    "model/model.txt",
    "reference.safetensors",
)
SIGNATURE = of_each_task(*INPUTS).binary


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Installation, Installation, bytes]:
    """Return exporter, importer and the bytes of a bundle. No test may register anything."""
    folder = tmp_path_factory.mktemp("bundle")
    source, target = Installation(root=folder / "a"), Installation(root=folder / "b")
    write_trees(folder / "trees", SIGNATURE)
    source.register(folder / "trees")
    source.export(folder / "m.falaj")
    target.trust(source, "a")
    return source, target, (folder / "m.falaj").read_bytes()


World = tuple[Installation, Installation, bytes]


def refusal(world: World, tmp_path: Path, data: bytes) -> str:
    """Import these bytes, and return the message of the refusal."""
    file = tmp_path / "bad.falaj"
    file.write_bytes(data)
    with pytest.raises(RefusedError) as caught:
        world[1].take(file)
    assert world[1].registry.names() == []
    return str(caught.value)


def contents(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {
            member.name: (archive.extractfile(member) or pytest.fail(member.name)).read()
            for member in archive.getmembers()
        }


def written(tmp_path: Path, parts: dict[str, bytes]) -> bytes:
    """Return the archive of these parts, the envelope first."""
    path = tmp_path / "written.falaj"
    others = {name: data for name, data in parts.items() if name != ENVELOPE}
    with new_archive(path, parts[ENVELOPE], others):
        pass
    data = path.read_bytes()
    path.unlink()
    return data


FILES = {
    "events": "events.jsonl",
    "model": "model/model.txt",
    "pickle": "model/model.pkl",
    "reference": "reference.safetensors",
    "definitions": "definitions.json",
}


def unchanged(_: dict[str, Any]) -> None:
    """Change nothing in a statement."""


def resigned(
    world: World, tmp_path: Path, change: Callable[[dict[str, Any]], None] = unchanged, **new: bytes
) -> bytes:
    """Return the bundle with changed parts and a changed statement that the trusted exporter signed again."""
    parts = contents(world[2])
    payload = json.loads(base64.b64decode(json.loads(parts.pop(ENVELOPE))["payload"]))
    parts |= {FILES[name]: data for name, data in new.items()}
    described = describe_parts(parts)
    payload["subject"] = [{"name": part.name, "digest": {"sha256": part.sha256}} for part in described]
    payload["predicate"]["sizes"] = {part.name: part.size for part in described}
    change(payload)
    encoded = canonical(payload)
    signer = ensure_signer(Path(world[0].places.keys))
    envelope = {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(encoded).decode(),
        "signatures": [{"keyid": signer.key_id, "sig": signer.sign(pre_authentication_encoding(encoded))}],
    }
    ordered = {part.name: parts[part.name] for part in described}
    return written(tmp_path, {ENVELOPE: canonical(envelope), **ordered})


@pytest.mark.parametrize("name", PARTS)
def test_an_altered_part_is_refused_by_its_name(world: World, tmp_path: Path, name: str) -> None:
    """One bit of each part is changed."""
    parts = contents(world[2])
    assert set(PARTS) == parts.keys() - {ENVELOPE}
    start = world[2].index(parts[name])
    data = bytearray(world[2])
    data[start + len(parts[name]) // 2] ^= 1
    assert f"'{name}' was altered" in refusal(world, tmp_path, bytes(data))


@pytest.mark.parametrize("name", PARTS)
def test_a_removed_or_replaced_part_is_refused_by_its_name(world: World, tmp_path: Path, name: str) -> None:
    parts = contents(world[2])
    shorter = parts | {name: parts[name][:-1]}
    assert f"'{name}'" in refusal(world, tmp_path, written(tmp_path, shorter))
    del shorter[name]
    assert f"'{name}'" in refusal(world, tmp_path, written(tmp_path, shorter))


def test_each_place_of_the_statement_is_signed(world: World, tmp_path: Path) -> None:
    """Statement and signature are changed at many places."""
    envelope = contents(world[2])[ENVELOPE]
    for place in range(0, len(envelope), 97):
        altered = bytearray(envelope)
        altered[place] ^= 1
        parts = contents(world[2]) | {ENVELOPE: bytes(altered)}
        message = refusal(world, tmp_path, written(tmp_path, parts))
        assert "statement" in message or "not trusted" in message or "payload" in message


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.2, 0.5, 0.9])
def test_a_half_written_file_is_refused(world: World, tmp_path: Path, share: float) -> None:
    data = world[2][: int(len(world[2]) * share)]
    message = refusal(world, tmp_path, data)
    assert "cut off" in message or "no bundle" in message


def member(name: str, data: bytes = b"x", **fields: Any) -> bytes:
    """Return a tar archive with one member."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for field, value in fields.items():
            setattr(info, field, value)
        archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def test_foreign_members_are_refused(world: World, tmp_path: Path) -> None:
    """Path traversal, links, a second part of one name, and data after the end."""
    blocks = world[2].rstrip(b"\0")
    end = -(-len(blocks) // 512) * 512
    body = world[2][:end]
    for extra in (
        member("../../evil"),
        member("/etc/evil"),
        member("model/model.txt"),
        member("link", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    ):
        assert "after its last part" in refusal(world, tmp_path, body + extra)
        assert "no bundle" in refusal(world, tmp_path, extra + world[2])
    first = body.index(b"definitions.json\0") if b"definitions.json\0" in body else -1
    assert first > 0
    inserted = body[:first] + member("../../evil")[:1024] + body[first:]
    assert "'../../evil' with 1 bytes where the signed 'definitions.json'" in refusal(
        world, tmp_path, inserted
    )


@pytest.mark.parametrize("size", [2**24 + 1, 2**40, 8**11 - 1])
def test_huge_sizes_are_refused_before_anything_is_read(world: World, tmp_path: Path, size: int) -> None:
    """A header that claims much more than the file has costs no memory."""
    info = tarfile.TarInfo(ENVELOPE)
    info.size, info.mode = size, 0o600
    assert "no bundle" in refusal(world, tmp_path, info.tobuf(tarfile.GNU_FORMAT))

    def enlarge(payload: dict[str, Any]) -> None:
        payload["predicate"]["sizes"]["model/model.txt"] = size

    assert "larger than the file" in refusal(world, tmp_path, resigned(world, tmp_path, enlarge))


@pytest.mark.parametrize(
    "data", [b"PK\x03\x04" + bytes(600), b"\x1f\x8b" + bytes(600), b"hello", b"\0" * 20_480]
)
def test_other_files_are_refused(world: World, tmp_path: Path, data: bytes) -> None:
    """Compressed archives are no bundles."""
    assert "is no bundle" in refusal(world, tmp_path, data)


@pytest.mark.parametrize("name", ["../m", "m/../../x", "", "a" * 65, ".m"])
def test_a_trusted_exporter_cannot_choose_paths(world: World, tmp_path: Path, name: str) -> None:
    """A signed name of a model or part is checked too."""

    def rename(payload: dict[str, Any]) -> None:
        payload["predicate"]["model"]["name"] = name

    assert "is no model version" in refusal(world, tmp_path, resigned(world, tmp_path, rename))

    def rename_part(payload: dict[str, Any]) -> None:
        payload["subject"][0]["name"] = f"model/{name}/x"
        payload["predicate"]["sizes"][f"model/{name}/x"] = 1

    assert "is no name of a part" in refusal(world, tmp_path, resigned(world, tmp_path, rename_part))


def test_a_trusted_exporter_cannot_claim_events_or_scores(world: World, tmp_path: Path) -> None:
    """Events that are not in the signed tree, other scores, and a file that is no model are refused by name."""
    parts = contents(world[2])
    forged = parts["events.jsonl"].replace(b'"auc":0.9', b'"auc":0.99')
    assert "Event 1 in events.jsonl is not in the exporter's ledger" in refusal(
        world, tmp_path, resigned(world, tmp_path, events=forged)
    )
    assert "does not have the event that registered m version 1" in refusal(
        world, tmp_path, resigned(world, tmp_path, events=b"")
    )
    for data in (b"no json\n", b"{}\n", b'{"entry": {}, "path": 3}\n'):
        assert "Line 1 of events.jsonl" in refusal(world, tmp_path, resigned(world, tmp_path, events=data))
    other = re.sub(rb"(leaf_value=-?)\d", rb"\g<1>9", parts["model/model.txt"], count=1)
    assert "gives other scores here" in refusal(world, tmp_path, resigned(world, tmp_path, model=other))
    assert "not a LightGBM text model" in refusal(world, tmp_path, resigned(world, tmp_path, model=b"x"))
    assert "reference.safetensors" in refusal(world, tmp_path, resigned(world, tmp_path, reference=b"x"))
    assert "definitions.json" in refusal(world, tmp_path, resigned(world, tmp_path, definitions=b"[]"))


def test_only_allowed_formats_are_imported(world: World, tmp_path: Path) -> None:
    """A trusted exporter of another release cannot bring in a pickle."""
    data = resigned(world, tmp_path, pickle=b"x")
    assert "'model/model.pkl' has no allowed format" in refusal(world, tmp_path, data)


@needs_root
def test_a_file_of_another_user_is_refused(world: World, tmp_path: Path) -> None:
    file = tmp_path / "m.falaj"
    file.write_bytes(world[2])
    os.chown(file, NOBODY, NOBODY)
    with pytest.raises(ConfigError, match=f"belongs to user {NOBODY}"):
        world[1].take(file)


def test_what_is_no_readable_file_is_refused(world: World, tmp_path: Path) -> None:
    """A missing file, a folder and a named pipe, which would never end."""
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("none", "No such file"), (".", "no regular file"), ("pipe", "no regular file")):
        with pytest.raises(ConfigError, match=message):
            world[1].take(tmp_path / name)


def test_an_export_replaces_no_file_and_leaves_no_part(world: World, tmp_path: Path) -> None:
    """An existing output, a missing folder, and an export that is killed before its event."""
    source = world[0]
    (tmp_path / "there").write_text("mine")
    for name, message in (("there", "exists"), ("none/m.falaj", "cannot be written: No such file")):
        with pytest.raises(ConfigError, match=message):
            source.export(tmp_path / name)
    assert (tmp_path / "there").read_text() == "mine"
    with pytest.raises(KeyboardInterrupt), new_archive(tmp_path / "m.falaj", b"{}", {}):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_disk_without_links_gets_the_file_too(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A memory stick has FAT, which refuses links."""

    def refuse(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    world[0].export(tmp_path / "m.falaj")
    assert [path.name for path in tmp_path.iterdir()] == ["m.falaj"]


def test_a_full_disk_leaves_no_file_and_no_event(world: World, tmp_path: Path) -> None:
    """The message says that the disk is full. The permission of the export may be sampled, and then has an event."""
    exported = list(world[0].ledger.entries(ModelExported))
    with mounted_small_disk(tmp_path / "disk") as disk:
        fill_disk(disk / "filler")
        with pytest.raises(ConfigError, match="No space left"):
            world[0].export(disk / "m.falaj")
        assert [path.name for path in disk.iterdir()] == ["filler"]
    assert list(world[0].ledger.entries(ModelExported)) == exported


def test_a_damaged_version_is_not_exported(tmp_path: Path) -> None:
    """The file that differs from the registered one is named, and no bundle is written."""
    source = Installation(root=tmp_path / "a")
    write_trees(tmp_path / "trees", SIGNATURE)
    version = source.register(tmp_path / "trees")
    Path(version.uri, "model.txt").write_bytes(b"x")
    with pytest.raises(ArtifactTampered, match=r"model\.txt"):
        source.export(tmp_path / "m.falaj")
    assert not (tmp_path / "m.falaj").exists()
