"""Import modules with definitions and the code of transforms."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from cluster.errors import DefinitionError


def import_module(module: str) -> ModuleType:
    """Import a module of definitions, also from the working directory.

    Raises:
        DefinitionError: The module or one of its imports is missing.
    """
    # `ray job submit` runs in the uploaded folder, which is not always on the path.
    working_dir = str(Path.cwd())
    if working_dir not in sys.path and "" not in sys.path:
        sys.path.insert(0, working_dir)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise DefinitionError(
                f"No module '{module}' for definitions. Run the command in the folder that has it, or add the folder "
                "to PYTHONPATH."
            ) from error
        raise DefinitionError(
            f"Definitions module '{module}' imports '{error.name}', which is missing."
        ) from error
