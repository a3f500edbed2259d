"""Tasks of your own: a class in a Python file, or the entry point of an installed package."""

import sys
import traceback
from collections.abc import Iterable
from dataclasses import is_dataclass
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

ENTRY_POINTS = "lmsleep.tasks"
MEMBERS = ("vocab_size", "difficulty_name", "batch", "floors", "solve", "spell")


def own_task(name: str, listed: Iterable[str] = ()) -> type[Any]:
    """The task class called `FILE.py:CLASS`, or that of the entry point `name` in group `lmsleep.tasks`.

    Errors name the `listed` tasks too.

    Raises:
        ValueError: if there is no such file, class or entry point, or it is no task.
    """
    file, _, cls = name.rpartition(":") if ".py:" in name else (name, "", "")
    if file.endswith(".py"):
        module = _module(Path(file).resolve())
        found = getattr(module, cls, None) if cls else None
        if found is None:
            there = ", ".join(k for k, v in vars(module).items() if _is_own(v, module)) or "none"
            raise ValueError(f"{file} has no class {cls!r}; call the task {file}:CLASS, one of: {there}")
    else:
        points = entry_points(group=ENTRY_POINTS)
        if name not in points.names:
            known = ", ".join([*listed, *sorted(points.names), "FILE.py:CLASS"])
            raise ValueError(f"unknown task {name!r}; choose one of {known}")
        try:
            found = points[name].load()
        except Exception as error:
            raise ValueError(f"the entry point {points[name].value} of task {name} fails: {error}") from error
    _check(name, found)
    return found


def own_name(cls: type) -> str:
    """The name by which `own_task` finds a class again.

    Raises:
        ValueError: if there is none, as for a class made inside a function.
    """
    for point in entry_points(group=ENTRY_POINTS):
        if point.value.replace(" ", "") == f"{cls.__module__}:{cls.__qualname__}":
            return point.name
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None or "." in cls.__qualname__:
        raise ValueError(f"task {cls.__qualname__} must stand at the top of a Python file, to be found again")
    return f"{Path(file).resolve()}:{cls.__name__}"


def _module(path: Path) -> ModuleType:
    """The module of a file, imported once: it may be the script that runs."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file is not None and Path(file).name == path.name and Path(file).resolve() == path:
            return module
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    spec = spec_from_file_location(str(path), path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
    return module


def _is_own(value: object, module: ModuleType) -> bool:
    return isinstance(value, type) and is_dataclass(value) and value.__module__ == module.__name__


def _check(name: str, cls: Any) -> None:
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise ValueError(f"{name} is no task: it must be a dataclass (of options), see lmsleep.tasks.Task")
    members = {*dir(cls), *cls.__dataclass_fields__}
    if missing := [member for member in MEMBERS if member not in members]:
        raise ValueError(f"{name} is no task: it lacks {', '.join(missing)}, see lmsleep.tasks.Task")
