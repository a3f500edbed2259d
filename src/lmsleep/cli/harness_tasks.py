"""Tasks of lm-eval, found by name, loaded, and checked before a model is."""

import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager

from lmsleep.integrations.generation import writing


def load_tasks(
    names: Sequence[str],
    include_path: Path | None,
    *,
    metadata: Mapping[str, Any],
    generation: Mapping[str, Any],
    unsafe_code: bool,
) -> tuple[TaskManager, list[Any]]:
    """Load tasks with their data, and check that a model that sleeps can do them.

    Args:
        names: of tasks, groups or tags, patterns of such, or YAML files.
        include_path: a folder with tasks of one's own.
        metadata: what tasks that make their data themselves are told: a tokenizer, lengths.
        generation: settings that stand over those of the tasks.
        unsafe_code: whether tasks may run code that the model writes.

    Returns:
        The manager that found them; tasks and groups, as `lm_eval.simple_evaluate` takes them.

    Raises:
        ValueError: for a name that is unknown, a task that cannot be loaded, or one that a model that sleeps
            cannot do.
    """
    writing(generation)  # for its checks, before any data is loaded
    manager, known = _known(names, include_path, metadata)
    found = []
    for name in known:
        with _loading(name):
            loaded = manager.load([name])
        for own, task in loaded["tasks"].items():
            _check(own, task, generation, unsafe_code)
            # Templates are filled in only when a question is asked. Its bar, of one question, says nothing.
            with _loading(own), redirect_stderr(StringIO()):
                task.build_all_requests(limit=1)
        within = {child for children in loaded.get("group_map", {}).values() for child in children}
        both = {**loaded.get("groups", {}), **loaded["tasks"]}
        found += [item for own, item in both.items() if own not in within]
    # Together, for one that is named twice.
    every = manager.load(found)["tasks"]
    if generation and not any(_writes(task) for task in every.values()):
        raise ValueError(f"gen_kwargs: {', '.join(every)} want no text to be written; leave the option out")
    return manager, found


@contextmanager
def evaluating() -> Iterator[None]:
    """Say what a task's own code raises as a `ValueError` of one line; what our code raises stays."""
    try:
        yield
    except (ValueError, OSError, RuntimeError):
        raise
    except Exception as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        if Path(last.filename).is_relative_to(Path(__file__).parents[1]):
            raise
        raise ValueError(f"tasks: {_reason(error)} (in {last.filename}, line {last.lineno})") from error


def _known(
    names: Sequence[str], include_path: Path | None, metadata: Mapping[str, Any]
) -> tuple[TaskManager, list[str]]:
    """Return a manager and all that the names name, of `include_path` alone if that is enough."""
    told = dict(metadata)
    if include_path is not None:
        # Indexing all of lm-eval's own tasks takes seconds: there are thousands.
        own = TaskManager(include_path=str(include_path), include_defaults=False, metadata=told)
        if all(matches := [own.match_tasks([name]) for name in names]):
            return own, _once(matches)
    every = TaskManager(include_path=None if include_path is None else str(include_path), metadata=told)
    # A file by its path; whether a name is one matters only where no task has it.
    matches = [every.match_tasks([name]) or [name] * Path(name).is_file() for name in names]
    if unknown := [name for name, match in zip(names, matches, strict=True) if not match]:
        raise ValueError(
            f"tasks: lm-eval has no {', '.join(unknown)}; your own are found with --include-path"
        )
    return every, _once(matches)


def _once(matches: Sequence[Sequence[str]]) -> list[str]:
    """Return each name once, in the order of the command line."""
    return list(dict.fromkeys(name for match in matches for name in match))


def _check(name: str, task: Any, generation: Mapping[str, Any], unsafe_code: bool) -> None:
    """Refuse what would be refused after hours: answers come after all choices are scored."""
    if getattr(task, "UNSAFE_CODE", False) and not unsafe_code:
        raise ValueError(
            f"tasks: {name} runs code that the model writes on this machine; "
            "--confirm-run-unsafe-code allows it"
        )
    if getattr(task, "MULTIMODAL", False):
        raise ValueError(f"tasks: {name} has pictures or sounds, and the model reads text alone")
    if _writes(task):
        try:
            writing({**(task.get_config("generation_kwargs") or {}), **generation})
        except ValueError as error:
            raise ValueError(f"tasks: {name}: {error}") from None


def _writes(task: Any) -> bool:
    return bool(task.get_config("output_type") == "generate_until")


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Say whatever is raised as a `ValueError` of one line: a task's own code makes its data."""
    # It reports each try to reach the Hub; if none succeeds the error says it once.
    hub = logging.getLogger("huggingface_hub")
    before = hub.level
    hub.setLevel(logging.ERROR)
    try:
        yield
    except Exception as error:
        raise ValueError(f"tasks: {name} cannot be loaded: {_reason(error)}") from error
    finally:
        hub.setLevel(before)


def _reason(error: Exception) -> str:
    """Say an error of a task in one line, and what to do where that is known."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, ModuleNotFoundError):
        return f"{said}; install that package, or lm-eval with the extra that its task needs"
    if isinstance(error, ConnectionError):
        return f"{said}; its data lie there, so a network is needed for the first time"
    return (
        said
        if said and isinstance(error, ValueError | OSError | ImportError)
        else f"{type(error).__name__}: {said}"
    )
