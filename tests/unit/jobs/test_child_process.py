"""Tests of a command that runs as a child process."""

from __future__ import annotations

import pytest

from jobs.child_process import execute


def test_child_ends_with_its_state_and_last_line(capfd: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 is a refusal, and any other code a failure. The reason is the last line of the errors."""
    for code, state in ((0, "done"), (2, "refused"), (3, "failed")):
        script = f"echo out; echo one >&2; echo why >&2; exit {code}"
        ended = execute(["sh", "-c", script], folder="/", variables={})
        assert (ended.exit_code, ended.state, ended.was_stopped) == (code, state, False)
        assert ended.reason == ("" if code == 0 else "why")
    assert capfd.readouterr().out == "out\n" * 3


def test_child_that_runs_too_long_is_ended() -> None:
    """The reason says so."""
    late = execute(["sleep", "60"], folder="/", variables={}, timeout_s=0.1)
    assert (late.state, "longer" in late.reason) == ("failed", True)


def test_all_reasons_of_a_refusal_are_the_reason() -> None:
    """A pipeline gives one line for each fault. The reason lacks the word `refused`, which the state says already."""
    script = "echo working >&2; echo refused: a is wrong. >&2; echo refused: b is wrong. >&2; exit 2"
    assert execute(["sh", "-c", script], folder="/", variables={}).reason == "a is wrong. b is wrong."
