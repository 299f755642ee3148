"""The names that the result of a stage can have, as far as they are known before the stage runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.errors import suggest_name

METRICS = (
    "accuracy", "auc", "bias", "brier", "ece", "log_loss", "mae", "mean_probability", "positive_rate", "r2", "rmse",
    "rows", "selection_rate",
)  # fmt: skip
"""Metrics of the three tasks, without lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Results:
    """Known names of a result. It can have others too."""

    names: tuple[str, ...]

    def fault(self, name: str) -> str:
        """Return what is wrong with a required name that looks like a misspelled known one; else "".

        A known name can have values below it, such as `hidden_share.<view>`. So only names with equally many parts are
        compared.
        """
        if name in self.names or any(known.endswith(f".{name}") for known in self.names):
            return ""
        if "." in name:
            comparable = [known for known in self.names if known.count(".") == name.count(".")]
        else:
            comparable = [known.rpartition(".")[2] for known in self.names]
        guess = suggest_name(name, comparable)
        return f"require.{name}: the result has no value of this name.{guess}" if guess else ""


_OF_MODEL = Results(names=("name", "version", "family", *(f"metrics.{name}" for name in METRICS)))
RESULTS = {
    "feature_jobs.ingest": Results(names=("rows_in", "rows_stored", "rows_quarantined")),
    "feature_jobs.training_set": Results(names=("service", "rows", "row_hash", "hidden_share")),
    "jobs.evaluate": _OF_MODEL,
    "jobs.train": _OF_MODEL,
}
"""Results of Falaj's commands, as the guide on pipelines lists them."""


def returned(tree: ast.Module) -> Results | None:
    """Return the names of the dict that `main` of a user's command returns, or None if the source does not show them.

    They are shown by `return {"rows": …}`, and by `return figures(…)` of a function of the same module that does so.
    """
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    names = _names(functions, "main", seen=frozenset())
    return None if not names else Results(names=tuple(sorted(names)))


def _names(functions: dict[str, ast.FunctionDef], name: str, *, seen: frozenset[str]) -> set[str] | None:
    if name not in functions or name in seen:
        return None
    names: set[str] = set()
    for statement in _own_nodes(functions[name]):
        if not isinstance(statement, ast.Return):
            continue
        match statement.value:
            case ast.Dict(keys=keys) if all(isinstance(key, ast.Constant) for key in keys):
                names |= {str(key.value) for key in keys if isinstance(key, ast.Constant)}
            case ast.Call(func=ast.Name(called)):
                found = _names(functions, called, seen=seen | {name})
                if found is None:
                    return None
                names |= found
            case _:
                return None
    return names


def _own_nodes(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Yield the nodes of a function without those of functions inside it."""
    queue: list[ast.AST] = list(function.body)
    while queue:
        node = queue.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            queue += ast.iter_child_nodes(node)
