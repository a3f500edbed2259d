"""A run is a folder: configuration, metrics, checkpoints, report.

RUN/config.json           what determines the run, and where it was made
RUN/metrics.jsonl         one JSON object per line: training losses and evaluations
RUN/checkpoints/step-*/   model (config.json, model.safetensors; of a pretrained model what is trained of it,
                          trained.safetensors) and trainer.pt; of a sharded run shards/ in place of the model
RUN/report.json           the final evaluation
RUN/model/                of a pretrained model that was trained to its end: an adapter, or the whole
RUN/.training.*           lock and lease of the process that trains it
"""

import errno
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lmsleep import trust
from lmsleep.backbones import Model, build, kind_of, load
from lmsleep.files import check_folder, locked, write_atomic
from lmsleep.launched import launched
from lmsleep.plugins import code_named
from lmsleep.training import data
from lmsleep.training.config import RunConfig
from lmsleep.training.lease import leased
from lmsleep.training.processes import Processes
from lmsleep.version import __version__

if TYPE_CHECKING:
    from lmsleep.training.slices import Saver

KEEP = 2  # checkpoints
BRANCH = "branch"  # name of the checkpoint that a shorter run is continued from
SPENT = ("step", "tokens", "flops", "seconds")
TRAINER = "trainer.pt"  # of a checkpoint, beside the model
SHARDS = "shards"  # of that of a sharded run: a folder, in the place of the model
LOCK = "training"
LOCKED = f".{LOCK}.lock"  # the file that `files.locked` makes for it
HOLDER = f".{LOCK}.lease"  # the file of `leased`
HELD = (LOCKED, HOLDER)
PAUSE = 1.0  # seconds between tries to lock
# What a kill may leave beside the files of a run: half of one.
LEFT = re.compile(r"\.{1,2}(config\.json|metrics\.jsonl|report\.json|model|training\.lease)\..+")
# Of file systems that have no locks; training without one is better than none.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunFolder:
    """Reads and writes one run's folder; every file is replaced atomically or appended to."""

    def __init__(self, path: str | Path, *, trust: bool = False) -> None:
        """Name a folder, which need not be there.

        Args:
            path: the folder.
            trust: run the Python files that its config.json names, whoever brought them.
        """
        self.path, self.trust = Path(path), trust
        self._held = False

    @classmethod
    def create(cls, path: str | Path, config: RunConfig) -> "RunFolder":
        """Make a new folder with the configuration in it; one that holds no more than that is as good.

        Raises:
            FileExistsError: if there is anything else in the folder.
            ValueError: if another process makes it.
            OSError: if the folder cannot be made.
        """
        folder = cls(path)
        folder.make(config)
        return folder

    def make(self, config: RunConfig) -> None:
        """Make the folder of a new run; errors as of `create`."""
        plain = config.to_dict()
        self.check_new(config)  # before the lock, which is a file in it
        with self.locked():
            self.check_new(config)  # and now that nobody else can make it
            try:
                made = {"made_by": provenance(), "data": data.hashes(config.task)}
                self._write_json("config.json", {**plain, **made})
            except BaseException:
                # What cannot begin leaves no folder.
                if not self._entries():
                    shutil.rmtree(self.path)
                raise
        # Code that was named here may run when the run is opened; what a foreign run names may not.
        trust.remember(code_named(plain))

    def has_begun(self) -> bool:
        """Say whether the folder holds more of a run than its configuration."""
        return self.path.is_dir() and bool({*self._entries()} - {"config.json"})

    def clear(self) -> None:
        """Remove all that the folder holds; it must be locked."""
        for path in self.path.iterdir():
            if path.name not in HELD:
                _remove(path)

    def check_new(self, config: RunConfig) -> None:
        """Refuse a folder in which a run with this configuration cannot begin.

        Raises:
            FileExistsError: if there is more in it than this configuration, and what a kill may leave.
            NotADirectoryError: if it is a file, or in one.
        """
        check_folder(self.path, "out")
        held = self._entries() if self.path.is_dir() else []
        if held and not (held == ["config.json"] and self.is_of(config)):
            raise FileExistsError(
                f"{self.path} exists and is not empty; continue it with --resume, or name another --out"
            )

    def is_of(self, config: RunConfig) -> bool:
        """Say whether this is a run of that configuration; raises ValueError if its own is damaged."""
        # As plain data, in which paths are absolute: the same command may name them in another way.
        return self.is_run() and self.config().to_dict() == config.to_dict()

    def _entries(self) -> list[str]:
        """List what is in the folder, without what a kill may leave of a run that has not begun."""
        return sorted(p.name for p in self.path.iterdir() if not _is_left(p) and p.name not in HELD)

    @contextmanager
    def locked(self, patience: float = 0.0) -> Iterator[None]:
        """Keep other processes from training this run; the lock ends with this process, even a killed one.

        It makes the folder if it is missing, and may be taken again while it is held.

        Args:
            patience: seconds to wait for another process.

        Raises:
            ValueError: if another process trains it.
            OSError: if the folder cannot be written.
        """
        if self._held:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            until = time.monotonic() + patience
            while True:
                try:
                    stack.enter_context(self._claimed())
                    break
                except ValueError:
                    if time.monotonic() >= until:
                        raise
                except OSError:
                    # What cannot begin leaves no folder; one that holds anything stays.
                    with suppress(OSError):
                        self.path.rmdir()
                    raise
                time.sleep(PAUSE)
            self._held = True
            stack.callback(setattr, self, "_held", False)
            yield

    @contextmanager
    def locked_for(self, processes: Processes, patience: float = 0.0) -> Iterator[None]:
        """Lock it for processes that train it together, in all of them; as of `locked`."""
        with ExitStack() as stack:
            with processes.together():
                if processes.main:
                    stack.enter_context(self.locked(patience))
            yield

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """Take the lock of this machine's processes, then the lease, which others know as well."""
        with ExitStack() as stack:
            alone = True
            try:
                stack.enter_context(locked(self.path / LOCK))
            except ValueError:
                raise self._taken("another process") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                alone = False
            try:
                stack.enter_context(leased(self.path / HOLDER, alone=alone))
            except ValueError as error:
                raise self._taken(str(error)) from None
            yield

    def _taken(self, holder: str) -> ValueError:
        return ValueError(f"{self.path} is being trained by {holder}; wait for it to end")

    @classmethod
    def open(cls, path: str | Path, *, trust: bool = False) -> "RunFolder":
        """Open an existing run; arguments as of the class.

        Raises:
            FileNotFoundError: if there is none at `path`.
            ValueError: if its config.json is damaged.
        """
        folder = cls(path, trust=trust)
        if not folder.is_run():
            raise FileNotFoundError(
                f"{folder.path} is not a run: it has no config.json of one (see lmsleep train)"
            )
        return folder

    def is_run(self) -> bool:
        """Say whether there is a config.json that describes a run (and not, say, a model).

        Raises:
            ValueError: if it is damaged.
        """
        # A saved model has a config.json too, without this section.
        return (self.path / "config.json").is_file() and "train" in self._read_json("config.json")

    def config(self) -> RunConfig:
        """Return the run's configuration.

        Raises:
            ValueError: naming the file, if it is damaged.
            PermissionError: if it names code that may not run (see `trust`).
        """
        found = self._read_json("config.json")
        try:
            with self.naming_code():
                # Fitted when it was written: a task that must read its data to know its tokens is not asked.
                return RunConfig.from_dict(found, fit=False)
        except ValueError as error:
            raise ValueError(f"{self.path / 'config.json'}: {error}") from error

    def naming_code(self) -> AbstractContextManager[None]:
        """Return the context in which the run's files are read, any of which may name code."""
        return trust.named_by(self.path / "config.json", trust=self.trust)

    def made_by(self) -> dict[str, Any]:
        """Return what made the run: version, commit, command, software, hardware."""
        made = self._read_json("config.json").get("made_by")
        if not isinstance(made, dict):
            raise ValueError(
                f"{self.path / 'config.json'} is damaged: made_by={made!r} does not say what made it"
            )
        return made

    def check_data(self, remedy: str) -> None:
        """Refuse data that changed since the run was made (its config.json has their hashes).

        Args:
            remedy: what to do instead, for the message.

        Raises:
            ValueError: naming the file that is gone or has changed, or a damaged config.json.
        """
        recorded = self._read_json("config.json").get("data")
        # Runs of before hashes were kept have nothing to compare with.
        if recorded is None:
            return
        if not isinstance(recorded, dict):
            raise ValueError(f"{self.path / 'config.json'} is damaged: data must be an object")
        data.check(self.path, recorded, self.config().task, remedy)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to the metrics."""
        path = self.path / "metrics.jsonl"
        with _naming(path), path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the metrics so far; a last line that a kill cut short is left out.

        Raises:
            ValueError: naming the line, if one is damaged.
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if _is_record(record):
                yield record
            # Lines are appended whole and in order, so that only what has no line end can be cut short.
            elif number < len(lines):
                raise ValueError(
                    f"{path} is damaged or foreign: line {number}, {line[:80]!r}, is no line of metrics; "
                    "remove it"
                )

    def rewind(self, step: int) -> None:
        """Go back to `step`: drop what is of later steps, which will be repeated, and what kills left.

        Raises:
            ValueError: if a line of the metrics is damaged.
        """
        metrics, kept = list(self.metrics()), self.path / "metrics.jsonl"
        later = [path for path in self.checkpoints() if int(path.name[-8:]) > step]
        if later or any(m["step"] > step for m in metrics):
            # It says that the run is complete, hence first.
            (self.path / "report.json").unlink(missing_ok=True)
        for path in later:
            _remove(path)
        # Written anew as a whole: this also drops half a line, after which nothing could be appended.
        lines = [json.dumps(m) + "\n" for m in metrics if m["step"] <= step]
        write_atomic(kept, "".join(lines).encode())
        self._sweep()

    def _sweep(self) -> None:
        """Remove what kills left; nobody else writes here, for the run is locked."""
        root = self.path / "checkpoints"
        half = (path for path in root.glob("step-????????") if not (path / TRAINER).is_file())
        left = filter(_is_left, self.path.iterdir())
        for path in [*half, *left, *root.glob(".*"), *root.glob(f"{BRANCH}-*")]:
            _remove(path)

    def checkpoint(self, step: int, name: str = "step") -> Path:
        """Return where the checkpoint of a step is; `name`: what stands before the step."""
        # Eight digits, so that names sort by step.
        return self.path / "checkpoints" / f"{name}-{step:08d}"

    def save_checkpoint(
        self, final: Path, write_model: Callable[[Path], None], trainer: dict[str, Any]
    ) -> None:
        """Write a checkpoint beside the others, complete or not at all; keep the newest two.

        Args:
            final: where it is to be (`checkpoint`).
            write_model: writes the model into a folder, which it makes.
            trainer: all else that goes on, for `torch.save`.

        Raises:
            OSError: naming the file, if it cannot be written; the checkpoints before are untouched.
        """
        final.parent.mkdir(exist_ok=True)
        # The dot keeps a partial one out of `checkpoints`.
        partial = final.parent / f".partial-{os.getpid()}"
        try:
            write_model(partial)
            _save(trainer, partial / TRAINER)
            self._put(partial, final)
        except Exception:
            # What a full disk cut short takes room that the next try needs.
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def save_shards(
        self, final: Path, saver: "Saver", named: Mapping[str, Tensor], trainer: dict[str, Any]
    ) -> None:
        """Begin to write a checkpoint of a sharded run, in all its processes; otherwise as `save_checkpoint`.

        Args:
            final: where it is to be (`checkpoint`), once all have written.
            saver: writes it while training goes on; `wait` waits for it.
            named: the tensors of this process, as `slices.tensors` names them.
            trainer: all else that goes on, for `torch.save`.

        Raises:
            OSError: if it, or the one before it, cannot be written.
        """
        partial = final.parent / f".{final.name}"

        def begin() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _save(trainer, partial / TRAINER)

        saver.save(partial, named, begin, lambda: self._put(partial, final))

    def _put(self, partial: Path, final: Path) -> None:
        """Put a checkpoint that is whole in its place, and remove older ones."""
        # A folder cannot be renamed over one that holds files.
        if final.exists():
            _remove(final)
        partial.rename(final)
        # Only now, when the new one is in its place.
        for old in self.checkpoints()[:-KEEP]:
            _remove(old)

    def checkpoints(self) -> list[Path]:
        """List the checkpoints, oldest first."""
        found = (p for p in self.path.glob("checkpoints/step-????????") if p.name[-8:].isdecimal())
        # Others are what older versions, when they were killed, left of one that they removed.
        return sorted(p for p in found if (p / TRAINER).is_file() or any(p.glob("*.safetensors")))

    def latest(self, *, resumable: bool = False) -> Path:
        """Return the newest checkpoint; `resumable`: that training can go on from, not a model alone.

        Raises:
            FileNotFoundError: if there is none yet.
        """
        found = self.checkpoints()
        if not found:
            raise FileNotFoundError(f"{self.path} has no checkpoint yet: lmsleep train --resume {self.path}")
        if resumable:
            found = [path for path in found if (path / TRAINER).is_file()]
        if not found:
            raise FileNotFoundError(f"{self.path} holds a model alone: without {TRAINER} no training goes on")
        return found[-1]

    def model(self, device: torch.device | str = "cpu", config: RunConfig | None = None) -> Model:
        """Return the model of the newest checkpoint; `config`: the run's, if it has been read."""
        # Evaluation mode, since who opens a run reads with it; the trainer calls train() itself.
        return self.model_of(self.latest(), config or self.config(), device).eval()

    def model_of(
        self,
        checkpoint: Path,
        config: RunConfig,
        device: torch.device | str = "cpu",
        *,
        bfloat16: bool = False,
    ) -> Model:
        """Return the model of a checkpoint.

        Raises:
            FileNotFoundError: if it lacks a file.
            ValueError: if it is damaged or of another configuration; says what to do about it.
        """
        try:
            with self.naming_code():
                if (checkpoint / SHARDS).is_dir():
                    return _put_together(config.model, checkpoint, bfloat16).to(device)
                return load(config.model, checkpoint, device, bfloat16=bfloat16)
        except (ValueError, FileNotFoundError) as error:
            # What a checkpoint is loaded into may be missing too, and removing it would be no help.
            if str(checkpoint) not in str(error):
                raise
            raise type(error)(f"{error}; {self.without(checkpoint)}") from error

    def without(self, checkpoint: Path) -> str:
        """Say how to go on without a checkpoint that is damaged."""
        before = [path.name for path in self.checkpoints() if path.name < checkpoint.name]
        return f"remove {checkpoint}, and the run goes on from {before[-1] if before else 'its beginning'}"

    @property
    def exported(self) -> Path:
        """The folder that a fine-tuned model is written to."""
        return self.path / "model"

    def source(self) -> "RunFolder | None":
        """Return the run that exports the pretrained model of this one, if it was not finished yet."""
        model = self.config().model
        folder = kind_of(model).source(model)
        if folder is None:
            return None
        run = RunFolder(folder.parent, trust=self.trust)
        if folder.name != run.exported.name or not run.is_run():
            return None
        # The report comes after the export.
        return None if folder.exists() and (run.path / "report.json").exists() else run

    def report(self) -> dict[str, Any] | None:
        """Return the final report, if the run has ended; raises ValueError if it is damaged."""
        if not (self.path / "report.json").exists():
            return None
        report = self._read_json("report.json")
        if not _is_record(report) or not {"eval", "floors"} <= report.keys():
            raise ValueError(
                f"{self.path / 'report.json'} is damaged or foreign; remove it, and --resume writes it again"
            )
        return report

    def write_report(self, report: dict[str, Any]) -> None:
        """Write the final report."""
        self._write_json("report.json", report)

    def _read_json(self, name: str) -> dict[str, Any]:
        """Read an object of JSON; raises ValueError for what is none, naming the file."""
        file = self.path / name
        try:
            found = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{file} is damaged: it holds no object")
        return found

    def _write_json(self, name: str, data: dict[str, Any]) -> None:
        write_atomic(self.path / name, (json.dumps(data, indent=2) + "\n").encode())


def _put_together(options: Any, checkpoint: Path, bfloat16: bool) -> Model:
    """Return the model of which processes wrote slices."""
    from lmsleep.training.slices import load_weights  # which takes a second to import

    model = build(options, bfloat16=bfloat16)
    load_weights(checkpoint, kind_of(options).weights(model))
    return model


def _is_left(path: Path) -> bool:
    return LEFT.fullmatch(path.name) is not None


def _is_record(record: Any) -> bool:
    """Say whether this is a line of metrics, or a report: numbers under the names of what was spent, ..."""
    if not isinstance(record, dict):
        return False
    numbers = [record.get(name) for name in SPENT] + [v for k, v in record.items() if k == "loss"]
    score = record.get("eval", {"accuracy": 0, "per_difficulty": {}})
    # bool is a kind of int.
    return (
        type(record.get("step")) is int
        and all(type(v) in (int, float) for v in numbers)
        and isinstance(score, dict)
        and type(score.get("accuracy")) in (int, float)
        and isinstance(score.get("per_difficulty"), dict)
        and all(type(v) in (int, float) for v in score["per_difficulty"].values())
    )


def _remove(path: Path) -> None:
    """Remove a file or folder, so that a kill leaves no half of one under its name."""
    if path.is_dir() and not path.is_symlink():
        aside = path.with_name(f".{path.name.lstrip('.')}.removed")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(path.rename(aside))
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name `path` in an OSError that names no file, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def _save(trainer: Mapping[str, Any], path: Path) -> None:
    """Write with `torch.save`, down to the disk.

    Raises:
        OSError: naming the file.
    """
    with _naming(path), path.open("wb") as file:
        try:
            torch.save(trainer, file)
        except RuntimeError as error:
            # Where a write fails, as on a full disk, torch raises an error of its own from it.
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        file.flush()
        # On disk before the rename: a name must not point to what a crash of the machine has lost.
        os.fsync(file.fileno())


def provenance() -> dict[str, Any]:
    """Say what made a result: version, command, software, hardware."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "lmsleep": __version__,
        "commit": commit(),
        "command": " ".join([_program(), *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hardware": f"{device}, {os.cpu_count()} cores",
    }


def _program() -> str:
    """Return what was typed before the arguments."""
    program = Path(sys.argv[0])
    # Of a package that `-m` names the file is all that is known.
    module = f"-m {program.parent.name}" if program.name == "__main__.py" else None
    if launched():
        return f"torchrun --nproc-per-node={os.environ.get('WORLD_SIZE')} {module or program.name}"
    return f"python {module}" if module else program.name


def commit() -> str | None:
    """Return the commit of the sources that run, a + if they were changed since; None outside a checkout."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        # An installed package may lie inside someone else's checkout, whose commit says nothing of it.
        tracked = subprocess.run([*git, "ls-files", __file__], capture_output=True, text=True, check=True)
        if not tracked.stdout:
            return None
        # --exclude=*: no tag, always the abbreviated commit.
        found = subprocess.run([*git, "describe", "--always", "--dirty=+", "--exclude=*"],
                               capture_output=True, text=True, check=True)  # fmt: skip
    # No git, or no repository.
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _cpu_name() -> str:
    """Return the model of the CPU, where the system tells it, or else its architecture."""
    try:
        # `platform.processor` knows the architecture alone on Linux.
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())
