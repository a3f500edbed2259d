"""`lmsleep memory`: look at memory files, compare, merge, trace them back, and make slow weights of them."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tyro.conf import Positional

from lmsleep.cli.consolidate import ConsolidateOptions, consolidate
from lmsleep.cli.options import parse
from lmsleep.files import locked
from lmsleep.foreign import PEFT, read_json, reading
from lmsleep.memory import Saved, read
from lmsleep.memory.figures import diff_rows, head_rows, other_rows
from lmsleep.plain import to_json
from lmsleep.sleep import SleepConfig
from lmsleep.state import Memory


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """What memory files hold: method, origin, norm and effective rank of S by head; or slow weights.

    Of a memory file also its open window and what an eviction kept (working memory); of an adapter that
    `lmsleep memory consolidate` wrote its rank and size (slow weights).
    """

    files: Positional[tuple[Path, ...]]
    """Memory files, and folders of adapters of peft."""
    json: bool = False
    """Print one JSON document instead of text."""


@dataclass(frozen=True, kw_only=True)
class DiffOptions:
    """How two memories differ, head by head."""

    first: Positional[Path]
    """Memory file."""
    second: Positional[Path]
    """Memory file of the same layout."""
    json: bool = False
    """Print one JSON document instead of text."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Add memories of one model up, with weights."""

    files: Positional[tuple[Path, ...]]
    """Memory files, two or more."""
    out: Path
    """Memory file to write, which must not exist."""
    weights: tuple[float, ...] = ()
    """One a file; default equal shares of 1."""


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """A memory and all that it was forked and merged from, as far as it lies in the same folder."""

    file: Positional[Path]
    """Memory file."""
    json: bool = False
    """Print one JSON document instead of text."""


def memory(argv: list[str]) -> None:
    """Run `lmsleep memory show|diff|merge|log|consolidate`."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return
    if argv[0] not in COMMANDS:
        raise ValueError(f"unknown command 'memory {argv[0]}'; choose one of {', '.join(COMMANDS)}")
    options_of, command = COMMANDS[argv[0]]
    command(parse(options_of, argv[1:], f"lmsleep memory {argv[0]}"))


def _show(options: ShowOptions) -> None:
    """Print what memory files hold, when all are read."""
    if not options.files:
        raise ValueError("files must name at least one memory file")
    shown, said = [], []
    for path in options.files:
        if (path / PEFT).is_file():
            shown.append({"file": str(path), **_adapter(path)})
            said.append(f"{path}\n{_lines(_slow(shown[-1]))}")
            continue
        saved = read(path)
        found, others = saved.memory, other_rows(saved.memory)
        header = {**saved.header, **_layers(saved)}
        shown.append({"file": str(path), **header, "heads": head_rows(found), "others": others})
        beside = f"  beside S:\n{_table(others)}" if others else ""
        said.append(f"{path}\n{_lines(_origin(header))}{table(found)}{beside}")
    # Only now: a file that is none must not be found behind half of an answer.
    sys.stdout.write(to_json(shown) + "\n" if options.json else "".join(said))


def _layers(saved: Saved) -> dict[str, Any]:
    """Return what wrote a memory, and what its layers hold."""
    sleep = saved.header.get("sleep")
    by = SleepConfig.names(sleep) if isinstance(sleep, Mapping) else {}
    kept = [t for name, t in saved.tensors.items() if name.startswith(("cache.", "kept."))]
    return {
        # Files were once written without it; those of sessions say it all the same.
        "method": saved.origin.method or by.get("consolidator"),
        "eviction": by.get("eviction"),
        "open_window": len(saved.window),
        "kept": max((t.shape[1] for t in kept), default=0),
        "kept_bytes": sum(t.nbytes for t in kept),
        "bytes": saved.memory.nbytes,
    }


def _origin(header: Mapping[str, Any]) -> dict[str, object]:
    """Say who wrote a memory, how and from what, and what is in its three layers."""
    slept = "" if header["eviction"] is None else f", eviction {header['eviction']}"
    kept = f"{header['kept']:,} {'keys a head' if header['eviction'] == 'compact' else 'tokens'}"
    return {
        "id": header["id"],
        "parents": " ".join(header["parents"]) or "none",
        "method": f"{header['method'] or 'unknown'}{slept}",
        "read": f"{header['tokens']:,} tokens, {header['sleeps']:,} sleeps, N = {header['passes']}",
        # These tokens are saved beside S, and no sleep has written them into it.
        "open window": f"{header['open_window']:,} tokens, not in S",
        **({"kept": f"{header['kept_bytes']:,} bytes, {kept}"} if header["kept_bytes"] else {}),
        "fast weights": f"{header['bytes']:,} bytes, S",
        "slow weights": f"the model {header['model']}",
        "written": header["time"],
        **{f"tag {key}": value for key, value in header["tags"].items()},
    }


def _adapter(folder: Path) -> dict[str, Any]:
    """Return what an adapter of peft is; raises ValueError for a damaged one, OSError without weights."""
    config, file = read_json(folder / PEFT), folder / "adapter_model.safetensors"
    with reading(f"{file} is damaged"):
        nbytes = sum(t.nbytes for t in load_file(file).values())
    targets = config.get("target_modules")
    # Of every block the same ones, mostly: what they are called in it says enough.
    names = targets if isinstance(targets, list) else [targets]
    return {
        "rank": config.get("r"),
        "targets": sorted({str(name).rpartition(".")[2] for name in names}),
        "base": config.get("base_model_name_or_path"),
        "bytes": nbytes,
    }


def _slow(found: Mapping[str, Any]) -> dict[str, object]:
    """Say what an adapter is."""
    return {
        "slow weights": f"{found['bytes']:,} bytes, an adapter of rank {found['rank']}",
        "beside": " ".join(found["targets"]),
        "model": found["base"] or "unknown",
    }


def _lines(said: Mapping[str, object]) -> str:
    return "".join(f"  {_printable(name):<12} {_printable(value)}\n" for name, value in said.items())


def _printable(value: object) -> str:
    """Return a value out of a file as text that moves no cursor and begins no line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def table(found: Memory) -> str:
    """Write norm and effective rank of every head as text."""
    return _table(head_rows(found))


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """Write rows with the same keys as text, in columns under them."""
    if not rows:
        return "  no fast weights\n"
    lines = ["  " + "".join(f"{name:>16}" for name in rows[0])]
    for row in rows:
        cells = (f"{x:.4f}" if isinstance(x, float) else str(x) for x in row.values())
        lines.append("  " + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines) + "\n"


def _diff(options: DiffOptions) -> None:
    """Print how two memories differ."""
    first, second = Memory.load(options.first), Memory.load(options.second)
    rows, others = diff_rows(first, second), other_rows(first.diff(second))
    if options.json:
        sys.stdout.write(to_json(rows + others) + "\n")
    else:
        sys.stdout.write(_table(rows) + (f"  beside S:\n{_table(others)}" if others else ""))


def _merge(options: MergeOptions) -> None:
    """Merge memories into a new file."""
    if len(options.files) < 2:
        raise ValueError("merge takes two memory files or more")
    with locked(options.out):
        # Asked under the lock: two merges into one name must not both find it free.
        if options.out.exists():
            raise FileExistsError(f"{options.out} exists; name another --out or remove it")
        _merged(options).save(options.out)
    sys.stdout.write(f"{options.out}\n")


def _merged(options: MergeOptions) -> Memory:
    """Return the weighted sum; raises ValueError for a memory with an open window."""
    files = {path: read(path) for path in options.files}
    for path, saved in files.items():
        if len(saved.window):
            raise ValueError(
                f"{path} has {len(saved.window)} tokens in its open window, which a merge would lose; "
                "finish it with lmsleep read ... --sleep-at-end"
            )
    first, *others = [files[path].memory for path in options.files]
    return first.merge(others, options.weights or None)


def _log(options: LogOptions) -> None:
    """Print a memory and what it came from."""
    found = Memory.log(options.file)
    if options.json:
        rows = [{"file": where and str(where), **asdict(what)} for where, what in found]
        sys.stdout.write(to_json(rows) + "\n")
        return
    for where, what in found:
        if where is None:
            sys.stdout.write(f"{what.id[:12]}  not in this folder\n")
        else:
            parents = " ".join(parent[:12] for parent in what.parents) or "none"
            read = f"{what.tokens:,} tokens, {what.sleeps:,} sleeps"
            sys.stdout.write(f"{what.id[:12]}  {where.name}: {read}, parents {parents}\n")


# Below the functions that it names. The first lines of the options' docstrings are the help.
COMMANDS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "show": (ShowOptions, _show),
    "diff": (DiffOptions, _diff),
    "merge": (MergeOptions, _merge),
    "log": (LogOptions, _log),
    "consolidate": (ConsolidateOptions, consolidate),
}

HELP = "usage: lmsleep memory COMMAND ...\n\n" + "".join(
    f"  {name:<11} {(options.__doc__ or '').splitlines()[0]}\n" for name, (options, _) in COMMANDS.items()
)
