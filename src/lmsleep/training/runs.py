"""A run is a folder: configuration, metrics, checkpoints, report.

RUN/config.json           what determines the run, and where it was made
RUN/metrics.jsonl         one JSON object per line: training losses and evaluations
RUN/checkpoints/step-*/   model (config.json, model.safetensors; of a pretrained model what is trained of it,
                          trained.safetensors) and trainer.pt
RUN/report.json           the final evaluation
RUN/model/                of a pretrained model that was trained to its end: a Hugging Face folder
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from lmsleep.backbones import Model, kind_of, load
from lmsleep.files import write_atomic
from lmsleep.training import data
from lmsleep.training.config import RunConfig
from lmsleep.version import __version__

KEEP = 2  # checkpoints


class RunFolder:
    """Reads and writes one run's folder; every file is replaced atomically or appended to."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | Path, config: RunConfig) -> "RunFolder":
        """Make a new folder with the configuration in it.

        Raises:
            FileExistsError: if the folder exists and is not empty.
        """
        folder = cls(path)
        folder.check_new()
        # An empty folder may be there already, made by whoever chose the name.
        folder.path.mkdir(parents=True, exist_ok=True)
        made = {"made_by": provenance(), "data": data.hashes(config.task)}
        folder._write_json("config.json", {**config.to_dict(), **made})
        return folder

    def check_new(self) -> None:
        """Raise FileExistsError if the folder exists and is not empty."""
        if self.path.exists() and any(self.path.iterdir()):
            raise FileExistsError(
                f"{self.path} exists and is not empty; continue it with --resume, or name another --out"
            )

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Open an existing run.

        Raises:
            FileNotFoundError: if there is none at `path`.
            ValueError: if its config.json is damaged.
        """
        folder = cls(path)
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
        file = self.path / "config.json"
        if not file.is_file():
            return False
        try:
            config = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        # A saved model has a config.json too, without this section.
        return isinstance(config, dict) and "train" in config

    def config(self) -> RunConfig:
        """Return the run's configuration.

        Raises:
            ValueError: naming the file, if it is damaged.
        """
        path = self.path / "config.json"
        try:
            # Fitted when it was written: a task that must read its data to know its tokens is not asked.
            return RunConfig.from_dict(json.loads(path.read_text()), fit=False)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def made_by(self) -> dict[str, Any]:
        """Return what made the run: version, commit, command, software, hardware."""
        made: dict[str, Any] = json.loads((self.path / "config.json").read_text())["made_by"]
        return made

    def check_data(self, remedy: str) -> None:
        """Refuse data that changed since the run was made (its config.json has their hashes).

        Args:
            remedy: what to do instead, for the message.

        Raises:
            ValueError: naming the file that is gone or has changed.
        """
        recorded = json.loads((self.path / "config.json").read_text()).get("data")
        # Runs of before hashes were kept have nothing to compare with.
        if recorded is not None:
            data.check(self.path, recorded, self.config().task, remedy)

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to the metrics."""
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the metrics so far; a line that a kill cut short is left out."""
        path = self.path / "metrics.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                record = json.loads(line)
            # Lines are appended whole and in order, so that only the last one can be cut short.
            except ValueError:
                return
            if not isinstance(record, dict) or not {"step", "tokens", "flops", "seconds"} <= record.keys():
                raise ValueError(f"{path} is damaged or foreign: no line of metrics: {line[:80]!r}")
            yield record

    def rewind(self, step: int) -> None:
        """Drop metrics after `step`, those of steps that are about to be repeated."""
        # Written anew as a whole: this also drops half a line, after which nothing could be appended.
        lines = [json.dumps(m) + "\n" for m in self.metrics() if m["step"] <= step]
        write_atomic(self.path / "metrics.jsonl", "".join(lines).encode())

    def save_checkpoint(
        self, step: int, write_model: Callable[[Path], None], trainer: dict[str, Any], name: str = "step"
    ) -> Path:
        """Write a checkpoint beside the others, complete or not at all; keep the newest two.

        Args:
            step: steps taken.
            write_model: writes the model into a folder, which it makes.
            trainer: all else that goes on, for `torch.save`.
            name: before the step in the name of the checkpoint.
        """
        root = self.path / "checkpoints"
        root.mkdir(exist_ok=True)
        # Eight digits, so that names sort by step; the dot keeps a partial one out of `checkpoints`.
        final, partial = root / f"{name}-{step:08d}", root / ".partial"
        # A kill may have left one.
        shutil.rmtree(partial, ignore_errors=True)
        write_model(partial)
        with (partial / "trainer.pt").open("wb") as file:
            torch.save(trainer, file)
            file.flush()
            # On disk before the rename: a name must not point to what a crash of the machine has lost.
            os.fsync(file.fileno())
        # A folder cannot be renamed over one that holds files.
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        # Only now, when the new one is in its place.
        for old in self.checkpoints()[:-KEEP]:
            shutil.rmtree(old)
        return final

    def checkpoints(self) -> list[Path]:
        """List the complete checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-????????"))

    def latest(self) -> Path:
        """Return the newest checkpoint.

        Raises:
            FileNotFoundError: if there is none yet.
        """
        found = self.checkpoints()
        if not found:
            raise FileNotFoundError(f"{self.path} has no checkpoint yet: lmsleep train --resume {self.path}")
        return found[-1]

    def model(self, device: torch.device | str = "cpu", config: RunConfig | None = None) -> Model:
        """Return the model of the newest checkpoint; `config`: the run's, if it has been read."""
        # Evaluation mode, since who opens a run reads with it; the trainer calls train() itself.
        return load((config or self.config()).model, self.latest(), device).eval()

    @property
    def exported(self) -> Path:
        """The folder that a fine-tuned model is written to."""
        return self.path / "model"

    def source(self) -> "RunFolder | None":
        """Return the run that exports the pretrained model of this one, if it was not finished yet."""
        model = self.config().model
        folder = kind_of(model).source(model)
        if folder is None or folder.exists():
            return None
        run = RunFolder(folder.parent)
        return run if folder.name == run.exported.name and (run.path / "config.json").is_file() else None

    def report(self) -> dict[str, Any] | None:
        """Return the final report, if the run has ended."""
        path = self.path / "report.json"
        return json.loads(path.read_text()) if path.exists() else None

    def write_report(self, report: dict[str, Any]) -> None:
        """Write the final report."""
        self._write_json("report.json", report)

    def _write_json(self, name: str, data: dict[str, Any]) -> None:
        write_atomic(self.path / name, (json.dumps(data, indent=2) + "\n").encode())


def provenance() -> dict[str, Any]:
    """Say what made a result: version, command, software, hardware."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "lmsleep": __version__,
        "commit": _commit(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hardware": f"{device}, {os.cpu_count()} cores",
    }


def _commit() -> str | None:
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
