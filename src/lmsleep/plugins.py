"""Find what users bring along: an object in a Python file, `FILE.py:NAME`, or the entry point of a package.

Such a name can be written into a configuration, so it finds the object again in every other process: in the
workers that draw data, after `--resume`, in `eval` and in sessions.
"""

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from inspect import isabstract
from pathlib import Path
from types import ModuleType
from typing import Any

from lmsleep import trust


@dataclass(frozen=True)
class Plugin:
    """A kind of object that users may bring along.

    Attributes:
        what: what errors call it: "task", "rule".
        noun: what it is in its file: "class", "object".
        group: its group of entry points.
        is_one: whether an object of a module is one; those are listed where a name is wrong.
        must_be: how errors describe one.
    """

    what: str
    noun: str
    group: str
    is_one: Callable[[Any], bool]
    must_be: str

    def find(self, name: str, listed: Mapping[str, Any]) -> Any:
        """Find the object that is `listed`, called `FILE.py:NAME`, or that of the entry point `name`.

        Raises:
            ValueError: if there is no such object, its code fails, or it is not of this kind.
            PermissionError: if another file names it, and it may not run (`lmsleep.trust`).
        """
        if name in listed:
            return listed[name]
        found = self._brought_along(name, listed)
        if not self.is_one(found):
            raise ValueError(f"{name} is no {self.what}: it must be {self.must_be}")
        return found

    def _brought_along(self, name: str, listed: Iterable[str]) -> Any:
        named = in_file(name)
        if named is None:
            return self._entry_point(name, listed)
        file, attribute = named
        module = _module(Path(file).resolve())
        found = getattr(module, attribute, None) if attribute else None
        if found is None:
            # Only what the file itself defines: what it imports is no answer to a wrong name.
            there = [k for k, v in vars(module).items() if self.is_one(v) and _is_of(v, module)]
            raise ValueError(
                f"{file} has no {self.noun} {attribute!r}; call the {self.what} {file}:{self.noun.upper()}, "
                f"one of: {', '.join(there) or 'none'}"
            )
        return found

    def _entry_point(self, name: str, listed: Iterable[str]) -> Any:
        points = entry_points(group=self.group)
        if name not in points.names:
            known = ", ".join([*listed, *sorted(points.names), f"FILE.py:{self.noun.upper()}"])
            raise ValueError(f"unknown {self.what} {name!r}; choose one of {known}")
        try:
            return points[name].load()
        except Exception as error:  # the code of others runs here, and may raise anything
            raise ValueError(
                f"the entry point {points[name].value} of {self.what} {name} fails: {error}"
            ) from error

    def name_of(self, cls: type, listed: Mapping[str, Any]) -> str:
        """Return the name by which `find` finds a class again.

        Raises:
            ValueError: if there is none, as for a class made inside a function.
        """
        for name, one in listed.items():
            if one is cls:
                return name
        for point in entry_points(group=self.group):
            # Blanks around the colon are allowed in a package's metadata.
            if point.value.replace(" ", "") == f"{cls.__module__}:{cls.__qualname__}":
                return point.name
        file = getattr(sys.modules.get(cls.__module__), "__file__", None)
        # A dot: the class stands in another class or in a function, where getattr on a module finds nothing.
        if file is None or "." in cls.__qualname__:
            raise ValueError(
                f"{self.what} {cls.__qualname__} must stand at the top of a Python file, to be found again"
            )
        return absolute(f"{file}:{cls.__name__}")


def derives_from(base: type) -> Callable[[Any], bool]:
    """Return the test for dataclasses that derive from `base` and leave none of its methods out."""

    def is_one(cls: Any) -> bool:
        return isinstance(cls, type) and issubclass(cls, base) and is_dataclass(cls) and not isabstract(cls)

    return is_one


def absolute(name: str) -> str:
    """Return `FILE.py:NAME` with the whole path of the file, valid in any folder; other names as they are."""
    named = in_file(name)
    return f"{Path(named[0]).resolve()}:{named[1]}" if named and named[1] else name


def in_file(name: str) -> tuple[str, str] | None:
    """Return the file and what is asked of it, of a name like `FILE.py:NAME`; None for all other names."""
    if name.endswith(".py"):
        return name, ""  # what is asked is missing
    # The last colon: a path may have one of its own (C:\\).
    file, _, attribute = name.rpartition(":")
    return (file, attribute) if file.endswith(".py") else None


def code_named(data: Any) -> Iterator[Path]:
    """Yield the Python files that plain data name, wherever in it, of those that run in this process."""
    if isinstance(data, str) and (named := in_file(data)):
        file = Path(named[0]).resolve()
        # A text to be learned may end in .py too; it is no code until it runs.
        if _loaded(file) is not None:
            yield file
    elif isinstance(data, Mapping):
        data = list(data.values())
    for one in data if isinstance(data, list | tuple) else ():
        yield from code_named(one)


def _module(path: Path) -> ModuleType:
    """Return the module of a file, imported once: it may be the script that runs.

    A second copy would have classes of its own, which `isinstance` and `is` tell from those of the first.
    """
    if (module := _loaded(path)) is not None:
        return module
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    trust.check(path)
    spec = spec_from_file_location(str(path), path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up their annotations
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[spec.name]  # or the next call would find a module that ran only half
        # The innermost line of the user's own file, not of the library in which it failed.
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
    return module


def _loaded(path: Path) -> ModuleType | None:
    """Return the module of a file, if it has been imported."""
    # A list: asking a lazy module for an attribute may import others, and change the dict that is walked.
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        # Names first, since resolving a path asks the disk, once for each module there is.
        if file is not None and Path(file).name == path.name and Path(file).resolve() == path:
            return module
    return None


def _is_of(value: Any, module: ModuleType) -> bool:
    """Say whether a module made `value`, if it is a class: those that it only imports are not its own."""
    return not isinstance(value, type) or value.__module__ == module.__name__
