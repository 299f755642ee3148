"""One model signature for each task, all with the same inputs."""

from __future__ import annotations

from typing import NamedTuple

from cluster.runtime import InputSpec, ModelSignature, Task


class OfEachTask(NamedTuple):
    """One signature for each task."""

    binary: ModelSignature
    multiclass: ModelSignature
    regression: ModelSignature


def of_each_task(
    *inputs: InputSpec,
    binary: tuple[str | int, ...] = ("no", "yes"),
    multiclass: tuple[str | int, ...] = ("a", "b", "c"),
) -> OfEachTask:
    """Return one signature for each task, with these inputs and classes."""
    return OfEachTask(
        ModelSignature(task=Task.binary, inputs=inputs, label="y", classes=binary),
        ModelSignature(task=Task.multiclass, inputs=inputs, label="y", classes=multiclass),
        ModelSignature(task=Task.regression, inputs=inputs, label="y"),
    )
