"""A double of Ray's tasks: each runs in this process when it is started, and the test counts what was started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from jobs.monitor import measuring
from jobs.monitor.log import tasks


class InlineTask:
    """Double of a remote function."""

    def __init__(self, function: Callable[..., Any], started: list[Any]) -> None:
        self._function, self._started = function, started

    def options(self, **_: Any) -> InlineTask:
        return self

    def remote(self, *arguments: Any) -> Any:
        self._started.append(arguments)
        return self._function(*arguments)


class InlineRay:
    """Double of the module `ray`: a reference is its value."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counted: list[Any] = []
        self.measured: list[Any] = []
        self.fitted: list[Any] = []
        self.read: list[Any] = []
        monkeypatch.setattr(measuring, "ray", self)
        monkeypatch.setattr(tasks, "ray", self)
        monkeypatch.setattr(tasks, "count_task", InlineTask(tasks.count_files, self.counted))
        monkeypatch.setattr(
            measuring, "measure_log_chunks", InlineTask(measuring.measure_work, self.measured)
        )
        monkeypatch.setattr(
            measuring, "fit_version", InlineTask(measuring.fit_version._function, self.fitted)
        )
        monkeypatch.setattr(measuring, "measure_rows", InlineTask(measuring.measure_rows._function, []))
        monkeypatch.setattr(measuring, "prepare", InlineTask(lambda: None, []))
        monkeypatch.setattr(measuring, "read_fit", InlineTask(measuring.read_fit._function, self.read))

    def get(self, value: Any) -> Any:
        return value

    def wait(self, values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        return list(values[:1]), list(values[1:])

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True}]

    @property
    def chunks(self) -> list[str]:
        """Names of the measured chunks, since the last call."""
        names = [name for work, _ in self.measured for name in work.chunks]
        self.measured.clear()
        return names
