"""Checkpoints of sharded runs, in the format of `torch.distributed.checkpoint`: each process writes slices.

CHECKPOINT/trainer.pt       where the run is, as of any checkpoint
CHECKPOINT/shards/          weights (`model/NAME`) and what optimizers keep (`optimizer/NAME/KEY`), in files
                            of all processes, and `.metadata`, which says where each slice is

Slices are put together for whoever reads: as many processes, others, or one.
"""

import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from lmsleep.backbones import Model
from lmsleep.training.processes import Processes
from lmsleep.training.runs import SHARDS

# What `.metadata` is made of; a pickle of anything else could run code.
KNOWN = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
}  # fmt: skip


def tensors(
    weights: Mapping[str, Tensor], model: Model, optimizers: Sequence[Optimizer]
) -> dict[str, Tensor]:
    """Name what a checkpoint holds: weights, and what the optimizers keep for parameters of the model."""
    named = {f"model/{name}": weight for name, weight in weights.items()}
    for name, p in model.named_parameters():
        for optimizer in optimizers:
            # Asked without []: it would make an empty state.
            kept = optimizer.state.get(p, {})
            named |= {f"optimizer/{name}/{key}": torch.as_tensor(value) for key, value in kept.items()}
    return named


class Saver:
    """Writes checkpoints of a sharded run in the background; all processes make the same calls.

    Args:
        processes: of the run.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        # A group of its own, for its exchanges run beside those of training; gloo, for they are on the CPU.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=processes.patience))
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def save(
        self, partial: Path, named: Mapping[str, Tensor], begin: Callable[[], None], end: Callable[[], None]
    ) -> None:
        """Copy tensors and return; write them while they change. A checkpoint before it is waited for.

        Args:
            partial: folder that is written to.
            named: the tensors of this process, as `tensors` names them.
            begin: makes the folder, with what else is in it: in the main process, before all others write.
            end: gives the folder its name: in the main process, once all others have written.

        Raises:
            OSError: in all processes, if the checkpoint before this one, or the folder, could not be written.
        """
        self.wait()
        with self.processes.together():
            if self.processes.main:
                begin()
        # Copied to the CPU by `async_save`, which takes what is there already as it is.
        named = {k: t.detach().clone() if t.device.type == "cpu" else t.detach() for k, t in named.items()}
        writer = FileSystemWriter(partial / SHARDS)
        written = cast(Future[Any], async_save(dict(named), storage_writer=writer, process_group=self._group))

        def finish() -> None:
            # It is done, or has failed, in all of them at once: when the last one has written.
            try:
                written.result()
            except CheckpointException as error:  # no Exception, which `together` would pass on
                # What a full disk cut short takes room that the next try needs.
                if self.processes.main:
                    shutil.rmtree(partial, ignore_errors=True)
                raise _cause(error, partial) from error
            if self.processes.main:
                end()

        self._writing = self._thread.submit(finish)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            OSError: in all processes, if it could not be written.
        """
        writing, self._writing = self._writing, None
        with self.processes.together():
            if writing is not None:
                writing.result()


def _cause(error: CheckpointException, partial: Path) -> Exception:
    """Return the error of the first process that failed to write to a folder."""
    failed = next(iter(error.failures.values()), None)
    if not failed or not isinstance(failed[0], OSError):
        return RuntimeError(str(error))
    # A full disk names no file.
    if failed[0].errno is not None and failed[0].filename is None:
        failed[0].filename = str(partial)
    return failed[0]


def load_weights(checkpoint: Path, weights: Mapping[str, Tensor]) -> None:
    """Read weights into tensors, whole or sharded ones, in place.

    Raises:
        ValueError: naming the file, if it is damaged, incomplete or of other weights.
    """
    reader = _Reader(checkpoint / SHARDS)
    held = reader.held()
    wanted = {f"model/{name}": weight for name, weight in weights.items()}
    sizes = {name: tuple(kept.size) for name, kept in held.items() if name.startswith("model/")}
    for name in sorted({*sizes, *wanted}):
        has, own = sizes.get(name), tuple(wanted[name].shape) if name in wanted else None
        if has != own:
            said = [str(list(size)) if size is not None else "nothing" for size in (has, own)]
            raise ValueError(
                f"{reader.path} holds weights of another configuration: {name.removeprefix('model/')} is "
                f"{said[0]} instead of {said[1]}"
            )
    reader.load(wanted)


def load_optimizers(checkpoint: Path, model: Model, optimizers: Sequence[Optimizer]) -> None:
    """Read what optimizers keep for the parameters of a model, whole or sharded ones.

    Raises:
        ValueError: naming the file, if it is damaged, incomplete or of another model.
    """
    reader = _Reader(checkpoint / SHARDS)
    names = dict(model.named_parameters())
    owner = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    read: dict[str, Tensor] = {}
    for place, kept in reader.held().items():
        if not place.startswith("optimizer/"):
            continue
        _, name, key = place.split("/")
        p = names.get(name)
        if p is None or p not in owner or (kept.size and kept.size != p.shape):
            raise ValueError(f"{reader.path} holds the state of an optimizer of another model: {name}")
        # A number, such as the steps that AdamW has made, or something for each weight.
        made = torch.zeros_like(p) if kept.size else torch.zeros((), dtype=kept.properties.dtype)
        owner[p].state[p][key] = read[place] = made.detach()
    reader.load(read)


def share_out(optimizers: Sequence[Optimizer]) -> None:
    """Keep of the state of optimizers of sharded parameters the slices of this process alone.

    `load_state_dict` leaves there what one process had saved: whole tensors.
    """
    for optimizer in optimizers:
        for p, kept in optimizer.state.items():
            if isinstance(p, DTensor):
                for key, value in kept.items():
                    if value.shape == p.shape and not isinstance(value, DTensor):
                        # Without a source: every process has read all of it.
                        kept[key] = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)


class _Reader(FileSystemReader):
    """Reads slices, and no objects: a checkpoint is data and must not run code when it is opened."""

    path: Path

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (self.path / ".metadata").open("rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, Metadata):
            raise ValueError(f"{self.path / '.metadata'} holds no metadata")
        if found.storage_meta is not None:
            found.storage_meta.load_id = self.load_id
        return found

    def held(self) -> dict[str, TensorStorageMetadata]:
        """Return sizes and dtypes of what is there, by name; errors as of `load`."""
        with _reading(self.path):
            found = self.read_metadata().state_dict_metadata
            # Other objects are read with pickle.
            assert all(isinstance(kept, TensorStorageMetadata) for kept in found.values())
            return cast(dict[str, TensorStorageMetadata], found)

    def load(self, named: dict[str, Tensor]) -> None:
        """Read into tensors, each process what it needs.

        Raises:
            ValueError: naming the folder, if it is damaged or incomplete.
        """
        with _reading(self.path), warnings.catch_warnings():
            # Of one process alone it says that it is one.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(dict(named), storage_reader=self, no_dist=True)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Make a clear error of what PyTorch raises for damaged files, which may be nearly anything."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        failed = error.failures if isinstance(error, CheckpointException) else {}
        cause = next((found[0] for found in failed.values()), error)
        # Of files that may be whole.
        if isinstance(cause, PermissionError | MemoryError | torch.OutOfMemoryError):
            raise cause from None
        raise ValueError(f"{path} is damaged or foreign") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # dtypes are attributes of torch, found by name.
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name not in KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed")
        return super().find_class(module, name)
