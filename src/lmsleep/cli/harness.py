"""`lmsleep lm-eval`: tasks of EleutherAI's evaluation harness, read with sleep."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from lmsleep.cli.opening import SleepOptions, new_session
from lmsleep.cli.options import parse
from lmsleep.files import write_atomic
from lmsleep.plain import to_json
from lmsleep.session import Session
from lmsleep.version import __version__


@dataclass(frozen=True, kw_only=True)
class HarnessOptions(SleepOptions):
    """Evaluate a model on tasks of lm-eval, its contexts slept on window by window; nothing is truncated."""

    model: Positional[Path]
    """Folder of a Hugging Face model, a run or a saved model."""
    tasks: tuple[str, ...]
    """Names of tasks or groups."""
    passes: tuple[int, ...] = ()  # type: ignore[assignment]
    """Each N to read with; default that of the run or folder."""
    include_path: Path | None = None
    """Folder with tasks of your own (YAML)."""
    num_fewshot: int | None = None
    """Examples before each question; default the task's."""
    limit: int | None = None
    """Questions of each task; default all."""
    batch_size: int = 1
    """Contexts that are read together."""
    apply_chat_template: bool = False
    """Ask as the tokenizer's chat template says."""
    out: Path | None = None
    """Write results to this JSON file."""
    json: bool = False
    """Print one JSON document instead of a table."""


def harness(argv: list[str]) -> None:
    """Run `lmsleep lm-eval MODEL --tasks TASK...`."""
    options = parse(HarnessOptions, argv, "lmsleep lm-eval")
    if options.out is not None and not options.out.parent.is_dir():
        raise FileNotFoundError(f"out={options.out}: there is no folder {options.out.parent}")
    try:
        # An extra, slow to import; the checks above come first because they need nothing.
        import lm_eval
    except ImportError:
        raise ValueError("lm-eval is not installed: pip install 'lmsleep[eval,hf]'") from None
    from lmsleep.integrations.lm_eval import SleepLM

    tasks = _tasks(options)
    # `passes` here is a list of what to evaluate, which no session takes.
    session = new_session(options.model, replace(options, passes=None))
    found: dict[str, Any] = {}
    for n in options.passes or (session.sleep_config.passes,):
        sleep = session.sleep_config.with_passes(n)
        # The model is shared; a session for each N costs only its state.
        sleeping = Session(session.model, sleep, session.tokenizer, history=0)
        results = lm_eval.simple_evaluate(
            model=SleepLM(sleeping, batch_size=options.batch_size, progress=True),
            tasks=list(options.tasks),
            task_manager=tasks,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            apply_chat_template=options.apply_chat_template,
            log_samples=False,
        )
        assert results is not None, "this process is the only one"
        found[str(n)] = results["results"]
    document = {
        "model": str(options.model),
        "sleep": session.sleep_config.to_dict(),
        "lmsleep": __version__,
        "lm_eval": lm_eval.__version__,
        "limit": options.limit,
        "passes": found,
    }
    # default=str: lm-eval puts objects of its own among the figures.
    text = to_json(document, default=str) + "\n"
    if options.out is not None:
        write_atomic(options.out, text.encode())
    sys.stdout.write(text if options.json else _table(found))


def _tasks(options: HarnessOptions) -> Any:
    """Return a manager of tasks, of those in --include-path alone if they are enough: there are thousands."""
    from lm_eval.tasks import TaskManager

    if options.include_path is not None:
        if not options.include_path.is_dir():
            raise FileNotFoundError(f"include_path: there is no folder {options.include_path}")
        # Indexing all of lm-eval's own tasks takes seconds.
        own = TaskManager(include_path=str(options.include_path), include_defaults=False)
        if all(own.match_tasks([task]) for task in options.tasks):
            return own
    found = TaskManager(include_path=None if options.include_path is None else str(options.include_path))
    if unknown := [task for task in options.tasks if not found.match_tasks([task])]:
        raise ValueError(
            f"tasks: lm-eval has no {', '.join(unknown)}; your own are found with --include-path"
        )
    return found


def _table(found: dict[str, Any]) -> str:
    """Write a line for each task, N and metric, with its standard error."""
    lines = [f"{'task':<28} {'N':>3} {'metric':<22} {'value':>10} {'stderr':>10}"]
    for n, results in found.items():
        for task, figures in results.items():
            for key, value in figures.items():
                # Keys are "METRIC,FILTER"; the error of one is "METRIC_stderr,FILTER".
                name, _, filtered = key.partition(",")
                # Aliases are text; an error stands beside its value, not in a line of its own.
                if not isinstance(value, int | float) or name.endswith("_stderr") or name == "sample_len":
                    continue
                error = figures.get(f"{name}_stderr,{filtered}")
                shown = f"{error:>10.4f}" if isinstance(error, float) else f"{'':>10}"
                lines.append(f"{task:<28} {n:>3} {name:<22} {value:>10.4f} {shown}")
    return "\n".join(lines) + "\n"
