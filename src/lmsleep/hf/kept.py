"""Hidden states that no trained weight changes, computed once and kept on disk."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lmsleep.files import write_atomic
from lmsleep.hf.backbone import HFBackbone
from lmsleep.hf.cache import RunCache, through_cache
from lmsleep.memory import weights_fingerprint
from lmsleep.state import State

NO_OPTIONS = ("sleep", "transformers_version")  # fields of a configuration that change no hidden state


class KeptBackbone(HFBackbone):
    """A model whose memory layers alone are trained, and which computes what is frozen once for each window.

    A window begins with an empty working memory (hard eviction), so its hidden states up to the first memory
    layer are a function of its tokens. Of a window before which nothing was slept on they all are, for a
    `Recall` says nothing there: then the memory layers alone are run, and write. (A `JetBlock` always
    speaks.)

    Values are those of the plain backbone to the last bit. Of blocks that were not run, the state that is
    returned has no keys and values: it is one to be evicted.

    Args:
        backbone: with inserted memory layers; its model is shared.
        folder: for files of hidden states, a sub-folder for each model and precision. A group of rows of T
            tokens takes `4 d T` bytes a row, and so many for every memory layer where nothing was slept on.
        bfloat16: blocks compute in bfloat16.

    Raises:
        ValueError: for a model with other fast weights than those of inserted layers, or with dropout.
    """

    def __init__(self, backbone: HFBackbone, folder: Path, *, bfloat16: bool) -> None:
        super().__init__(backbone.model, backbone.layouts)
        self.after = [i for i, x in enumerate(self.layouts) if x.memory is not None]
        inserted = [getattr(self.blocks[i], "memory", None) for i in self.after]
        if None in inserted or not inserted:
            raise ValueError(
                "keep: hidden states are kept of models with inserted memory layers; this one has others"
            )
        modules = backbone.model.modules()
        if getattr(self.config, "attention_dropout", 0) or any(
            isinstance(m, nn.Dropout) and m.p for m in modules
        ):
            raise ValueError("keep: the model has dropout, so its hidden states are others at every step")
        self.recalls = all(self.layouts[i].recalls for i in self.after)
        memory = {id(p) for layer in inserted if layer is not None for p in layer.parameters()}
        frozen = {name: p for name, p in backbone.model.named_parameters() if id(p) not in memory}
        # Other versions of PyTorch, and blocks that are counted otherwise, round otherwise.
        # What the configuration says of the model, but not of where it lies and how it sleeps.
        own = {k: v for k, v in self.config.to_dict().items() if k[0] != "_" and k not in NO_OPTIONS}
        made = f"{weights_fingerprint(frozen)} {own} {self.after} {bfloat16} {torch.__version__}"
        self.folder = folder / hashlib.sha256(made.encode()).hexdigest()[:16]

    def _run_blocks(
        self, h: Tensor, state: State, start: int, stop: int, valid: Tensor | None, span: int | None
    ) -> tuple[Tensor, State]:
        # A layer that speaks of what it has just read is a part of its block.
        last = self.after[0] if self.recalls else self.after[0] - 1
        if start or last < 0:
            return super()._run_blocks(h, state, start, stop, valid, span)
        before = state.cache
        if span is not None or before.kept or bool(before.counts(state.batch_size).any()):
            raise ValueError("keep: hidden states are kept of windows that begin with nothing in attention")
        # Beside rows whose text has ended, which keep their working memory, all others have padding.
        state = State(state.memory, state.cache.last(0))
        if stop <= last:
            return self._kept(h, [stop - 1], valid)[0], state
        nothing = not any(bool(S.any()) for S in state.memory.tensors())
        if self.recalls and stop == self.num_blocks and nothing:
            *read, h = self._kept(h, [*self.after, stop - 1], valid)
            for i, x in zip(self.after, read, strict=True):
                _, state = self._remember(i, x, state, valid)
            return h, state
        h = self._kept(h, [last], valid)[0]
        if self.recalls:
            h, state = self._remember(last, h, state, valid)
        return super()._run_blocks(h, state, last + 1, stop, valid, span)

    def _remember(self, i: int, h: Tensor, state: State, valid: Tensor | None) -> tuple[Tensor, State]:
        """Run the memory layer of block i alone on `h` `[B, T, d]`, the output of the block without it."""
        cache, x = state.cache.layers[i], self.layouts[i]
        run = RunCache(self._lend(i, state.memory.S[i], cache, state.cache), valid)
        said = through_cache(self.blocks[i].memory, h, run, x.writer, None)
        # Nothing was added to keys and values, and so nothing is to be aligned.
        left = self._returned(i, run.finished(), cache[2] if x.kv else h, None)
        return h if said is None else h + said, state.replace(i, [left])

    def _kept(self, h: Tensor, taps: list[int], valid: Tensor | None) -> list[Tensor]:
        """Return the outputs `[B, T, d]` of some blocks without their memory layers, where nothing is said.

        They are of embeddings `h` and read from a file; where there is none yet, it is made.
        """
        key = hashlib.sha256(str((taps, h.shape)).encode())
        for t in (h, valid):
            if t is not None:
                key.update(t.detach().contiguous().view(torch.uint8).cpu().numpy().data)
        path = self.folder / f"{key.hexdigest()[:32]}.safetensors"
        try:
            found = load_file(path, device=str(h.device))
        except (FileNotFoundError, SafetensorError):  # what is damaged can be made again
            found = self._compute(h, taps, valid)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, save({name: t.cpu().contiguous() for name, t in found.items()}))
        return [found[str(i)] for i in taps]

    @torch.no_grad()
    def _compute(self, h: Tensor, taps: list[int], valid: Tensor | None) -> dict[str, Tensor]:
        found, start = dict[str, Tensor](), 0
        # Nothing was slept on, so a `Recall` says nothing.
        state = self.initial_state(len(h))
        for i in taps:
            if i >= start:
                h, _ = super()._run_blocks(h, state, start, i + 1, valid, None)
            found[str(i)], start = h, i + 1
        return found
