"""Imports between packages go in one direction."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp

ROOTS = ("cluster", "feature_jobs", "jobs", "serve_apps")


def test_no_package_imports_one_that_imports_it() -> None:
    """Neither packages nor modules of one package import each other in a cycle.

    The test leaves out commands (`__main__`), which are a layer above their package. It also leaves out
    imports for type checkers only.
    """
    graph = grimp.build_graph(*ROOTS, exclude_type_checking_imports=True)
    modules = [name for name in graph.modules if not name.endswith(".__main__")]
    siblings: dict[str, dict[str, set[str]]] = {}
    for module in modules:
        for imported in graph.find_modules_directly_imported_by(module):
            one, other = module.split("."), imported.split(".")
            shared = next(
                (at for at, (mine, its) in enumerate(zip(one, other, strict=False)) if mine != its), None
            )
            if shared is not None:
                beside = siblings.setdefault(".".join(one[:shared]), {})
                beside.setdefault(one[shared], set()).add(other[shared])
    assert {"", "cluster.security", "feature_jobs.store", "serve_apps"} <= siblings.keys()
    for package, imports in siblings.items():
        try:
            TopologicalSorter(imports).prepare()
        except CycleError as error:
            raise AssertionError(f"In {package or 'the tree'}: {' -> '.join(error.args[1])}") from error
