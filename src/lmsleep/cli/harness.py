"""`lmsleep lm-eval`: tasks of EleutherAI's evaluation harness, read with sleep."""

import os
import random
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from tyro.conf import Positional

from lmsleep.cli.opening import SleepOptions, new_session
from lmsleep.cli.options import parse
from lmsleep.cli.values import pairs
from lmsleep.files import write_atomic
from lmsleep.foreign import read_json
from lmsleep.gguf_file import is_gguf
from lmsleep.integrations.batches import Batches
from lmsleep.opening import find
from lmsleep.plain import to_json
from lmsleep.session import Session
from lmsleep.text.tokenizers import HuggingFace, Tokenizer
from lmsleep.version import __version__

# lm-eval's own seeds: of Python's random numbers, which many tasks make their data with, and of all others.
SEEDS = {"random_seed": 0, "numpy_random_seed": 1234, "torch_random_seed": 1234, "fewshot_random_seed": 1234}


@dataclass(frozen=True, kw_only=True)
class HarnessOptions(SleepOptions):
    """Evaluate a model on tasks of lm-eval, its contexts slept on window by window; nothing is truncated."""

    model: Positional[Path]
    """A Hugging Face folder or adapter, a GGUF file, a run or a saved model."""
    tasks: tuple[str, ...]
    """Names of tasks or groups, with * for any letters, or YAML files."""
    passes: tuple[int, ...] = ()  # type: ignore[assignment]
    """Each N to read with; default that of the run or folder."""
    include_path: Path | None = None
    """Folder with tasks of your own (YAML)."""
    metadata: tuple[str, ...] = ()
    """KEY=VALUE ... or a JSON object, for tasks that make their data themselves: RULER's take
    max_seq_lengths=[4096,8192]. The model's tokenizer is always told."""
    num_fewshot: int | None = None
    """Examples before each question; default the task's."""
    limit: int | float | None = None
    """Questions of each task, or the part of them below 1; default all."""
    gen_kwargs: tuple[str, ...] = ()
    """KEY=VALUE ... or a JSON object, over the task's: max_gen_toks, until, do_sample, temperature, top_p,
    top_k."""
    seed: int | None = None
    """Of draws, examples, and data that tasks make; default lm-eval's own (0 and 1234)."""
    batch_size: str = "1"
    """Contexts that are read together. auto: 64, and half as many where the device has no memory left."""
    apply_chat_template: bool = False
    """Ask as the tokenizer's chat template says."""
    system_instruction: str | None = None
    """Text before all questions; with the chat template what the system says."""
    fewshot_as_multiturn: bool = True
    """With the chat template: examples are turns of the chat, not part of the question."""
    confirm_run_unsafe_code: bool = False
    """Allow tasks that run code which the model writes, on this machine."""
    use_cache: Path | None = None
    """Keep answers in FILE-N4_rank0.db (for N = 4) and take up there after a kill."""
    log_samples: Path | None = None
    """Write what was asked and answered, and its scores, to this file, a JSON object a line."""
    out: Path | None = None
    """Write results to this JSON file."""
    json: bool = False
    """Print one JSON document instead of a table."""


def harness(argv: list[str]) -> None:
    """Run `lmsleep lm-eval MODEL --tasks TASK...`."""
    options = parse(HarnessOptions, argv, "lmsleep lm-eval")
    names, generation, metadata = _checked(options)
    tokenizer = find(options.model).tokenizer(options.tokenizer)  # fails before the slow imports below
    if options.apply_chat_template and getattr(_own(tokenizer), "chat_template", None) is None:
        raise ValueError("the model's tokenizer has no chat template; leave out --apply-chat-template")
    try:
        import lm_eval
    except ImportError:
        raise ValueError("lm-eval is not installed: pip install 'lmsleep[eval,hf]'") from None
    from lmsleep.cli.harness_tasks import evaluating, load_tasks
    from lmsleep.integrations.lm_eval import SleepLM

    seeds = SEEDS if options.seed is None else dict.fromkeys(SEEDS, options.seed)
    found: dict[str, Any] = {}
    samples: list[dict[str, Any]] = []
    # Standard output is for results alone, and tasks print.
    with redirect_stdout(sys.stderr), TemporaryDirectory() as folder:
        # As lm-eval does before it loads tasks: some make their data by chance.
        random.seed(seeds["random_seed"])
        np.random.seed(seeds["numpy_random_seed"])  # noqa: NPY002
        torch.manual_seed(seeds["torch_random_seed"])
        manager, tasks = load_tasks(
            names,
            options.include_path,
            metadata={**_told(tokenizer, Path(folder)), **metadata},
            generation=generation,
            unsafe_code=options.confirm_run_unsafe_code,
        )
        # `passes` here is a list of what to evaluate, which no session takes.
        session = new_session(options.model, replace(options, passes=None))
        configured = session.sleep_config
        for n in options.passes or (configured.passes,):
            sleep = configured.with_passes(n)
            # The model is shared; a session for each N costs only its state.
            sleeping = Session(session.model, sleep, session.tokenizer, history=0)
            with evaluating():
                results = lm_eval.simple_evaluate(
                    model=SleepLM(sleeping, batch_size=options.batch_size, progress=True),
                    tasks=tasks,
                    task_manager=manager,
                    num_fewshot=options.num_fewshot,
                    limit=options.limit,
                    gen_kwargs=generation or None,
                    apply_chat_template=options.apply_chat_template,
                    system_instruction=options.system_instruction,
                    fewshot_as_multiturn=options.fewshot_as_multiturn,
                    confirm_run_unsafe_code=options.confirm_run_unsafe_code,
                    use_cache=None if options.use_cache is None else f"{options.use_cache}-N{n}",
                    log_samples=options.log_samples is not None,
                    **seeds,
                )
            assert results is not None, "this process is the only one"
            found[str(n)] = results["results"]
            for task, of_task in results.get("samples", {}).items():
                samples += [{"passes": n, "task": task, **sample} for sample in of_task]
    document = {
        "model": str(options.model),
        "sleep": configured.to_dict(),
        "lmsleep": __version__,
        "lm_eval": lm_eval.__version__,
        "limit": options.limit,
        "gen_kwargs": generation,
        "metadata": metadata,
        **seeds,
        "passes": found,
    }
    # default=str: lm-eval puts objects of its own among the figures.
    text = to_json(document, default=str) + "\n"
    if options.log_samples is not None:
        lines = "".join(to_json(sample, indent=None, default=str) + "\n" for sample in samples)
        write_atomic(options.log_samples, lines.encode())
    if options.out is not None:
        write_atomic(options.out, text.encode())
    sys.stdout.write(text if options.json else _table(found))


def _checked(options: HarnessOptions) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Return names of tasks, generation settings and metadata; refuse what can be refused at once."""
    for flag in ("out", "log_samples", "use_cache"):
        _check_writable(flag, getattr(options, flag))
    if options.include_path is not None and not options.include_path.is_dir():
        raise FileNotFoundError(f"include_path: there is no folder {options.include_path}")
    if low := [n for n in options.passes if n < 1]:
        raise ValueError(f"passes must be at least 1, got {low[0]}")
    Batches(options.batch_size)  # for its check
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise ValueError(f"num_fewshot must not be negative, got {options.num_fewshot}")
    limit = options.limit
    if limit is not None and not (limit >= 1 and limit == int(limit)) and not 0 < limit < 1:
        raise ValueError(f"limit must be a whole number from 1, or a part between 0 and 1, got {limit}")
    # lm-eval's own command takes commas too.
    names = [name for names in options.tasks for name in names.split(",")]
    if not all(names):
        raise ValueError("tasks: a name is empty; lm-eval ls tasks lists all names")
    generation = pairs("gen_kwargs", options.gen_kwargs)
    # lm-eval takes the task's max_gen_toks before any other name of it.
    for alias in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
        if alias in generation:
            generation["max_gen_toks"] = generation.pop(alias)
    return names, generation, pairs("metadata", options.metadata)


def _check_writable(flag: str, path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(f"{flag}={path} is a folder; name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{flag}={path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{flag}={path}: the folder {path.parent} cannot be written")


def _told(tokenizer: Tokenizer, folder: Path) -> Mapping[str, Any]:
    """Return what tasks that make their own data are told of the tokenizer: the folder it lies in.

    One of a GGUF file is written into `folder`.
    """
    own = _own(tokenizer)
    if own is None:
        return {}
    place = Path(own.name_or_path)
    if is_gguf(place):
        own.save_pretrained(folder)
        place = folder
    # They would run code of the folder, and where they find none they would ask the Hub.
    if not place.is_dir() or _has_code(place):
        return {}
    return {"pretrained": str(place), "tokenizer": str(place)}


def _own(tokenizer: Tokenizer) -> Any:
    """Return the tokenizer of transformers, if it is one."""
    return tokenizer.tokenizer if isinstance(tokenizer, HuggingFace) else None


def _has_code(folder: Path) -> bool:
    files = [folder / name for name in ("config.json", "tokenizer_config.json")]
    return any(file.is_file() and "auto_map" in read_json(file) for file in files)


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
                # RULER has a metric for each length, -1 for one that was not asked for.
                if name.isdigit() and value < 0:
                    continue
                error = figures.get(f"{name}_stderr,{filtered}")
                shown = f"{error:>10.4f}" if isinstance(error, float) else f"{'':>10}"
                lines.append(f"{task:<28} {n:>3} {name:<22} {value:>10.4f} {shown}")
    return "\n".join(lines) + "\n"
