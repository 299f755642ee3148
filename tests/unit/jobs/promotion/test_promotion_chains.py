"""Bundles that are older than a registered version, that come back, or whose int8 scores differ too much."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.errors import ArtifactTampered, ConfigError, RefusedError
from jobs.promotion.archive import new_archive
from jobs.promotion.reference import parity, read_reference, require_close_scores, write_reference
from tests.samples.installations import Installation
from tests.samples.trees import write_trees
from tests.unit.jobs.promotion.test_promotion import SIGNATURE


def installation(root: Path, *, seed_files: Path | None = None) -> Installation:
    made = Installation(root=root)
    if seed_files is not None:
        made.register(seed_files)
    return made


def test_an_older_version_is_imported_only_on_demand(tmp_path: Path) -> None:
    """It would become the latest one."""
    write_trees(tmp_path / "trees", SIGNATURE)
    staging = installation(tmp_path / "staging", seed_files=tmp_path / "trees")
    staging.export(tmp_path / "1.falaj")
    (tmp_path / "trees" / "model.txt").write_text((tmp_path / "trees" / "model.txt").read_text() + "\n")
    staging.register(tmp_path / "trees")
    staging.export(tmp_path / "2.falaj")
    production = installation(tmp_path / "production")
    production.trust(staging, "staging")
    production.take(tmp_path / "2.falaj")
    with pytest.raises(RefusedError, match="newer version 2 of 'staging' is here as version 1"):
        production.take(tmp_path / "1.falaj")
    production.take(tmp_path / "1.falaj", older=True)
    assert production.registry.versions("m") == [1, 2]


def test_a_version_that_comes_back_is_refused(tmp_path: Path) -> None:
    """A exports, B imports and exports, and A and C know the version already."""
    write_trees(tmp_path / "trees", SIGNATURE)
    a = installation(tmp_path / "a", seed_files=tmp_path / "trees")
    b, c = installation(tmp_path / "b"), installation(tmp_path / "c")
    for importer, exporter, name in ((b, a, "a"), (c, a, "a"), (a, b, "b"), (c, b, "b")):
        importer.trust(exporter, name)
    a.export(tmp_path / "a.falaj")
    b.take(tmp_path / "a.falaj")
    c.take(tmp_path / "a.falaj")
    b.export(tmp_path / "b.falaj")
    for knows in (a, c):
        with pytest.raises(RefusedError, match="is here already, as version 1"):
            knows.take(tmp_path / "b.falaj")
        assert knows.registry.versions("m") == [1]


def test_int8_scores_must_be_close() -> None:
    """A probability by 0.1, another score by a tenth of its range. NaN is never close."""
    float32 = np.linspace(0, 1, 256, dtype=np.float32)
    require_close_scores(parity(float32, float32 + 0.05), float32, is_number=False)
    require_close_scores(parity(float32 * 100, float32 * 100 + 5), float32 * 100, is_number=True)
    for scores in (float32 + 0.2, np.full_like(float32, np.nan)):
        with pytest.raises(RefusedError, match="precision=exported"):
            require_close_scores(parity(float32, scores), float32, is_number=False)


@pytest.mark.parametrize("count", [0, 1, 255])
def test_a_bundle_has_all_reference_rows(count: int) -> None:
    """No rows would agree with any model."""
    rows = np.zeros((count, 2), dtype=np.float32)
    with pytest.raises(ArtifactTampered, match="does not have 256 reference rows"):
        read_reference(write_reference(rows, rows[:, 0].copy()))


def test_a_shared_folder_of_keys_and_two_names_of_one_key_are_refused(tmp_path: Path) -> None:
    write_trees(tmp_path / "trees", SIGNATURE)
    staging = installation(tmp_path / "staging", seed_files=tmp_path / "trees")
    staging.export(tmp_path / "m.falaj")
    production = installation(tmp_path / "production")
    production.trust(staging, "staging")
    production.trust(staging, "twin")
    with pytest.raises(ConfigError, match=r"'staging' and 'twin' in .* have the same key"):
        production.take(tmp_path / "m.falaj")
    (production.trusted / "twin.pub.pem").unlink()
    production.trusted.chmod(0o777)
    with pytest.raises(ConfigError, match=r"Another user can change .*trusted\. "):
        production.take(tmp_path / "m.falaj")


def test_an_error_of_the_ledger_is_not_taken_for_one_of_the_file(tmp_path: Path) -> None:
    """The event of an export is appended while the file is being written."""
    with (
        pytest.raises(OSError, match="the ledger is away"),
        new_archive(tmp_path / "m.falaj", b"{}", {}),
    ):
        raise OSError("the ledger is away")
    assert list(tmp_path.iterdir()) == []
