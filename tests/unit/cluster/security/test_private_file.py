"""Secret files must be private."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.errors import ConfigError, Unauthenticated
from cluster.security.private_file import is_private
from cluster.security.tokens.source import TokenSource


@pytest.mark.parametrize(
    ("mode", "owner", "own", "expected"),
    [
        (0o600, 1000, 1000, True),
        (0o400, 1000, 1000, True),
        *((mode, 1000, 1000, False) for mode in (0o640, 0o660, 0o604)),
        (0o600, 1001, 1000, False),
        (0o440, 0, 1000, True),
        (0o460, 0, 1000, False),
        (0o444, 0, 1000, False),
        (0o640, 0, 0, False),
        (0o600, 1000, 0, False),
    ],
)
def test_only_a_private_file_is_accepted(mode: int, owner: int, own: int, expected: bool) -> None:
    """A file of root that a group of the process can read also counts as private."""
    status = os.stat_result((0o100000 | mode, 0, 0, 1, owner, 0, 1, 0, 0, 0))
    assert is_private(status, own=own) == expected


def test_readable_token_file_is_refused(tmp_path: Path) -> None:
    """Links are followed, and the mode of the target counts."""
    file, link = tmp_path / "token", tmp_path / "link"
    file.touch(mode=0o600)
    file.write_text("a.b.c\n")
    link.symlink_to(file)
    assert TokenSource(file=str(link)).token() == "a.b.c"
    file.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600") as refused:
        TokenSource(file=str(link)).token()
    assert "a.b.c" not in str(refused.value)
    file.unlink()
    with pytest.raises(Unauthenticated, match="cannot be read"):
        TokenSource(file=str(link)).token()
