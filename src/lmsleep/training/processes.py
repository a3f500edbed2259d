"""Several processes that train one run: who they are, what they agree on, what they add up.

Started by torchrun, each reads its own rows of a step's batch. How they hold the parameters is in `sharing`.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lmsleep.launched import launched

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PATIENCE = 600  # seconds
# What gloo and NCCL say, in errors of no type of their own, when another process has gone or does not answer.
GONE = ("connection", "timed out", "timeout", "broken pipe", "socket", "gloo", "nccl")

T = TypeVar("T")


class Lost(RuntimeError):
    """Another process of the run ended, or did not answer in time."""


# Types of errors that processes tell each other; any other counts as ValueError.
KINDS = (
    Lost, FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError, OSError, MemoryError,
    RuntimeError,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Processes:
    """Processes that train one run together; `Processes()` is one alone.

    Attributes:
        rank: number of this one.
        size: how many there are.
        shard: how many share one copy of the parameters; 1: each has its own.
        patience: seconds that one waits for another.
        joined: whether there is a process group (torchrun may start a single process).
        launcher: process that torchrun is; 0: another launcher, which may leave them alone, or none.
    """

    rank: int = 0
    size: int = 1
    shard: int = 1
    patience: int = PATIENCE
    joined: bool = False
    launcher: int = 0

    @classmethod
    def join(cls, device: str = "auto", *, shard: int = 1, patience: int = PATIENCE) -> "Processes":
        """Join the processes that a launcher has started beside this one; without a launcher, stay alone.

        Where there is CUDA each takes the GPU of its local rank.

        Args:
            device: as of `choose_device`.
            shard: processes that share one copy of the parameters; must divide their number.
            patience: seconds to wait for others, here and later.

        Raises:
            ValueError: for what the launcher or the machine does not have, or a `shard` that does not divide.
            Lost: if the others do not come.
        """
        if shard < 1:
            raise ValueError(f"shard must be at least 1, got {shard}")
        if patience < 1:
            raise ValueError(f"patience must be at least 1 second, got {patience}")
        if not launched():
            if shard > 1:
                raise ValueError(
                    f"shard={shard} is for several processes; start them with torchrun --standalone "
                    f"--nproc-per-node={shard} -m lmsleep ..."
                )
            return cls()
        rank, size, local, here = _places()
        if size % shard:
            raise ValueError(f"shard={shard} must divide the number of processes, {size}")
        backend = _backend(device, local, here)
        from torch.distributed.rendezvous import rendezvous  # not in every build of PyTorch

        wait = timedelta(seconds=patience)
        try:
            # The launcher's store, by which they find each other.
            store, _, _ = next(rendezvous("env://", timeout=wait))
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
        except (RuntimeError, OSError) as error:
            raise Lost(
                f"not all of the {size} processes came within {patience} s "
                f"({os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}): {_line(error)}"
            ) from error
        launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0
        return cls(rank, size, shard, patience, joined=True, launcher=launcher)

    @staticmethod
    def leave() -> None:
        """Leave the others, if this process has joined any; nothing can be asked of them any more."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def main(self) -> bool:
        """True for the one that writes files and speaks."""
        return self.rank == 0

    @property
    def left_alone(self) -> bool:
        """True if torchrun was killed: it began this process in a session of its own, which outlives it."""
        return self.launcher not in (0, os.getppid())

    # What they agree on

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do something in all of them; what one of them raises is raised by all.

        It may be nested: all raise what one of them raises further within or further out.

        Raises:
            ValueError, OSError, RuntimeError: the error of the first one that failed.
        """
        if not self.joined:
            yield
            return
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            # What was agreed on within need not be told again, and nobody would listen.
            if isinstance(error, Lost) or getattr(error, "agreed", False):
                raise
            own = error
        said = self.gather(None if own is None else _told(own))
        for rank, failed in enumerate(said):
            if failed is None:
                continue
            kind, given = failed
            raised = own if rank == self.rank and own is not None else kind(*given)
            raised.agreed = True  # type: ignore[attr-defined]
            raise raised

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Refuse to go on where one of them has other facts (JSON-ready, nested by name) than the first.

        Raises:
            ValueError: naming the first that differs, its two values, and the processes.
        """
        first, *others = self.gather(dict(_flat(json.loads(json.dumps(facts)))))
        for rank, other in enumerate(others, start=1):
            for name in sorted({*first, *other}):
                if (a := first.get(name)) != (b := other.get(name)):
                    raise ValueError(
                        f"processes 0 and {rank} disagree about {name}: {a!r:.80} and {b!r:.80}; start all "
                        "of them with one command, from one version of lmsleep and of the data"
                    )

    # What they tell each other

    def gather(self, one: T) -> list[T]:
        """Return what each of them gives, by rank; anything that can be pickled."""
        if not self.joined:
            return [one]
        found: list[Any] = [None] * self.size
        with self.answering():
            dist.all_gather_object(found, one)
        return found

    def sums(self, *numbers: float) -> list[Any]:
        """Return the sums over all of them of a few numbers, all ints or all floats."""
        if not self.joined:
            return [*numbers]
        whole = all(isinstance(number, int) for number in numbers)
        # On the CPU: a GPU need not be waited for.
        row = torch.tensor(numbers, dtype=torch.int64 if whole else torch.float64)
        return self.summed(row).tolist()

    def summed(self, numbers: Tensor) -> Tensor:
        """Return the sums over all of them of the numbers of a tensor, which is overwritten."""
        if self.joined:
            with self.answering():
                dist.all_reduce(numbers)
        return numbers

    def mesh(self, device: torch.device) -> "DeviceMesh":
        """Return them in two dimensions, "replicate" and "shard": `shard` of them share one copy."""
        from torch.distributed.device_mesh import init_device_mesh

        dims = (self.size // self.shard, self.shard)
        with self.answering():
            return init_device_mesh(device.type, dims, mesh_dim_names=("replicate", "shard"))

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Say what it means that a collective failed.

        Raises:
            Lost: instead of the error of the backend.
        """
        try:
            yield
        except RuntimeError as error:
            if not self.joined or isinstance(error, Lost) or not _is_gone(error):
                raise
            raise Lost(f"a process of this run has ended, or did not answer for {self.patience} s") from error


ALONE = Processes()


def _places() -> tuple[int, int, int, int]:
    """Return rank, number of processes, local rank, and number of processes on this machine."""
    missing = [name for name in NEEDED if name not in os.environ]
    if missing:
        raise ValueError(
            f"a launcher has set {'RANK' if 'RANK' in os.environ else 'WORLD_SIZE'} and not "
            f"{', '.join(missing)}; start with torchrun --nproc-per-node=K -m lmsleep ..., or unset them"
        )
    found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    found["LOCAL_WORLD_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", found["WORLD_SIZE"])
    found["MASTER_PORT"] = os.environ["MASTER_PORT"]
    for name, value in found.items():
        if not value.isdecimal():
            raise ValueError(f"the launcher has set {name}={value!r}, which is no number")
    rank, size, local, here, _ = (int(value) for value in found.values())
    if rank >= size:
        raise ValueError(f"the launcher has set RANK={rank} of WORLD_SIZE={size}")
    return rank, size, local, here


def _backend(device: str, local: int, here: int) -> str:
    """Return the backends of the process group; take the GPU of this process, if it has one."""
    if not dist.is_available():
        raise ValueError("this build of PyTorch knows no other processes (torch.distributed); run one alone")
    if not (device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())):
        return "gloo"
    if device not in ("auto", "cuda"):
        raise ValueError(f"device={device!r}: each process takes a GPU of its own; use 'cuda' or 'auto'")
    gpus = torch.cuda.device_count()
    if gpus < here:
        raise ValueError(
            f"device={device!r}: {here} processes on this machine, and {gpus} GPUs; start at most one a GPU "
            f"(--nproc-per-node={max(gpus, 1)}), or use device='cpu'"
        )
    if not dist.is_nccl_available():
        raise ValueError("this build of PyTorch has no NCCL, which GPUs talk by; use device='cpu'")
    torch.cuda.set_device(local)
    return "cpu:gloo,cuda:nccl"


def _told(error: Exception) -> tuple[type[Exception], tuple[Any, ...]]:
    """Return the type that an error has in the other processes, which may not know its own, and what it says.

    Who handles errors there must take it for what it is here, or some would go on and others not.
    """
    kind = next((kind for kind in KINDS if isinstance(error, kind)), ValueError)
    if isinstance(error, OSError) and error.errno is not None:
        return kind, (error.errno, error.strerror, error.filename)
    return kind, (str(error),)


def _is_gone(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or any(sign in str(error).lower() for sign in GONE)


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _flat(facts: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(facts, dict):
        for key, value in facts.items():
            yield from _flat(value, f"{name}.{key}" if name else key)
    else:
        yield name, facts
