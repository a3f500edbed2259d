"""`HFBackbone`: a causal language model of `transformers` as the sleep algorithm sees it."""

import math
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lmsleep.hf.cache import Carried, RunCache
from lmsleep.hf.cache_name import named
from lmsleep.hf.positions import Positions, Turns, turned_back
from lmsleep.ops import right_align
from lmsleep.sleep.compact import Listening
from lmsleep.state import Cache, Memory, State

if TYPE_CHECKING:
    from lmsleep.hf.adapted import Adapted

# A group of rows costs as much as so many tokens of padding: the calls of all blocks, whatever they hold.
GROUP = 128
NORMS = ("norm", "final_layernorm", "norm_f")  # what families call the norm before the head


@dataclass(frozen=True)
class Layout:
    """The sizes and dtypes of what one block carries for one row.

    Attributes:
        memory: `S`, of the layer with number `writer`; None for a block without fast weights.
        writer: `layer_idx` of the layer in the block that has the fast weights.
        kv: heads and sizes of keys and values; None for a block without attention.
        channels: of the short convolution; None for none.
        dtype: of keys, values and convolution.
        memory_dtype: of `S`.
        slides: whether its tokens look back no further than the model's own `sliding_window`.
        turns: which numbers of a key its position turns together; None: positions do not show in keys;
            "otherwise": nobody knows, so keys stand where they were read.
        recalls: whether its fast weights are read as they were when the window began (`layers.Recall`). They
            are then a part of the working memory too, behind all else: `[B, 1, H K V]`, or `[B, 0, H K V]`
            while nothing is in the window.
    """

    memory: tuple[int, int, int] | None
    writer: int
    kv: tuple[tuple[int, int], tuple[int, int]] | None
    channels: int | None
    dtype: torch.dtype
    memory_dtype: torch.dtype
    slides: bool
    turns: Turns | Literal["otherwise"] | None = None
    recalls: bool = False


class HFBackbone(nn.Module):
    """A causal language model of `transformers` as a `lmsleep.Backbone`; made by `adapt`.

    Blocks are called one by one with the model's own rotary positions and masks as it would make them. What
    a block carries is a value (`hf.cache`). The working memory of an attention block is `(keys, values,
    ordinals)`, of a block with a convolution its tail; ordinals `[B, t]` int64 count a row's tokens from
    1 (0: padding), for keys are cached after rotation.

    Attributes:
        model: the model, unchanged.
        layouts: what each block carries.
    """

    def __init__(self, model: Any, layouts: Sequence[Layout]) -> None:
        super().__init__()
        self.model = model
        self.layouts = tuple(layouts)

    @property
    def config(self) -> Any:
        """The configuration of the text model."""
        return self.model.config.get_text_config()

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks themselves."""
        blocks: nn.ModuleList = self.model.get_decoder().layers
        return blocks

    @property
    def num_blocks(self) -> int:
        """The number of decoder blocks."""
        return len(self.blocks)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The parts of each block: "attention", "fast_weights", both joined by "+", or "mlp"."""
        parts = (
            "+".join(name for name, has in (("attention", x.kv), ("fast_weights", x.memory)) if has)
            for x in self.layouts
        )
        return tuple(part or "mlp" for part in parts)

    @property
    def vocab_size(self) -> int:
        """The number V of tokens that it reads: 0 ... V - 1."""
        size: int = self.config.vocab_size
        return size

    @property
    def device(self) -> torch.device:
        """The device of its embedding, on which tokens and states must lie."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def initial_state(self, batch_size: int) -> State:
        """Return `S = 0` and nothing in the working memory, for `batch_size` rows."""

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(batch_size, *shape, dtype=dtype, device=self.device)

        memory, cache = [], []
        for x in self.layouts:
            memory.append(None if x.memory is None else empty(*x.memory, dtype=x.memory_dtype))
            tensors = []
            if x.kv is not None:
                # Time is dimension 1 in every tensor of the working memory, so that eviction is one slice.
                tensors += [empty(0, *size, dtype=x.dtype) for size in x.kv]
                tensors.append(empty(0, dtype=torch.int64))
            if x.channels is not None:
                tensors.append(empty(0, x.channels, dtype=x.dtype))
            if x.recalls and x.memory is not None:
                tensors.append(empty(0, math.prod(x.memory), dtype=x.memory_dtype))
            cache.append(tuple(tensors))
        return State(Memory(tuple(memory)), Cache(tuple(cache)))

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens `[B, T]` (int64) as hidden states `h` `[B, T, d]`, scaled as the model scales them."""
        h: Tensor = self.model.get_input_embeddings()(tokens)
        # Granite and Falcon-H1 scale embeddings in the decoder's forward, which is not called here.
        scale = getattr(self.model.get_decoder(), "embedding_multiplier", None)
        return h if scale is None else h * scale

    def normed(self, h: Tensor) -> Tensor:
        """Return what the head reads of hidden states `[B, T, d]`: what the decoder alone gives."""
        decoder = self.model.get_decoder()
        normed: Tensor = next(getattr(decoder, name) for name in NORMS if hasattr(decoder, name))(h)
        return normed

    def head(self, h: Tensor) -> Tensor:
        """Map hidden states `[B, T, d]` to logits `[B, T, V]`, scaled as the model scales them."""
        decoder = self.model.get_decoder()
        logits: Tensor = self.model.get_output_embeddings()(self.normed(h))
        # As for embeddings: the scale of logits (Granite divides, Falcon-H1 and Cohere multiply, Gemma caps)
        # is in code not called here.
        if (divisor := getattr(self.config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        for factor in (
            getattr(decoder, "lm_head_multiplier", None),
            getattr(self.model, "logit_scale", None),
        ):
            logits = logits if factor is None else logits * factor
        if (cap := getattr(self.config, "final_logit_softcapping", None)) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def adapted(self, *, rank: int, alpha: float, targets: Collection[str] = (), seed: int = 0) -> "Adapted":
        """Return a backbone on the same weights with a new LoRA adapter, an `hf.adapted.Adapted`."""
        from lmsleep.hf.adapted import Adapted  # which derives from this class

        return Adapted(self, rank=rank, alpha=alpha, targets=targets, seed=seed)

    def run(
        self,
        h: Tensor,
        state: State,
        start: int,
        stop: int,
        *,
        valid: Tensor | None = None,
        span: int | None = None,
    ) -> tuple[Tensor, State]:
        """Run blocks `start ... stop - 1`; arguments and result are those of `HybridLM.run`.

        Padding is never shown to recurrences of `transformers`, which would forget on it: rows of different
        length run one length after the other. Attention sees nothing that comes later, and a `Recall` is told
        what is padding: rows of models with these alone run together, but for those much shorter.

        Raises:
            ValueError: if the model's own gradient checkpointing is on, which drops the state of every block.
        """
        if start == stop:  # before and after a loop over all blocks: no rows to sort, no masks to make
            return h, state
        if valid is not None and bool(valid.all()):
            valid = None
        if valid is not None:
            groups = self._by_length(valid, start, stop)
            if [*groups] != [h.shape[1]]:  # several, or one that ends before the last position
                return self._run_in_groups(h, state, start, stop, valid, span, groups)
        if not h.shape[1]:  # kernels of transformers want a token
            return h, state
        return self._run_blocks(h, state, start, stop, valid, span)

    def _run_blocks(
        self, h: Tensor, state: State, start: int, stop: int, valid: Tensor | None, span: int | None
    ) -> tuple[Tensor, State]:
        """Run blocks as `run` does, over rows that go together."""
        blocks = [*self.blocks][start:stop]  # a slice of a ModuleList would be a new module at every token
        if any(b.training and getattr(b, "gradient_checkpointing", False) for b in blocks):
            raise ValueError(
                "the model's own checkpointing of activations (gradients) drops what every block carries, "
                "so nothing would be remembered; switch it off and use checkpoint=True of sleep_forward"
            )
        where = Positions(self.model, h, state, self.layouts, start, stop)
        carried: dict[int, Carried] = {}
        memory = state.memory.S
        for i in range(start, stop):
            carried |= self._lend(i, memory[i], where.rebased(i), state.cache)
        cache = RunCache(carried, valid, sliding=span is not None)
        with _unrecorded(h):
            for i, block in zip(range(start, stop), blocks, strict=True):
                h = call_block(block, h, cache, where, self._mask(i, where, state.cache, span))
        done = cache.finished()
        left = [self._returned(i, done, where.ordinals, valid) for i in range(start, stop)]
        return _recordable(h), state.replace(start, left)

    def _reach(self, i: int, span: int | None) -> int | None:
        """Return how far tokens of block i look back: `span`, or the model's own window if it is shorter."""
        # Read from the configuration at every call, as the model does it.
        own: int | None = self.model.get_decoder().config.sliding_window if self.layouts[i].slides else None
        return min((limit for limit in (own, span) if limit is not None), default=None)

    def _mask(self, i: int, where: Positions, cache: Cache, span: int | None) -> Tensor | None:
        """Return what tokens see in block i, or None: all before them, or no attention."""
        if self.layouts[i].kv is None:
            return None
        if cache.kept:
            return where.mask_beside(cache.kept[i][2], self.config.num_attention_heads)
        return where.mask(self._reach(i, span))

    def _lend(
        self, i: int, memory: Tensor | None, cache: tuple[Tensor, ...], before: Cache
    ) -> dict[int, Carried]:
        x, lent, filled = self.layouts[i], {i: Carried()}, before.filled
        if x.kv is not None:
            lent[i].keys, lent[i].values = cache[:2]
            lent[i].kept = before.kept[i][:2] if before.kept else ()
        if x.memory is not None:
            # The layer that writes may have a number of its own: memory layers stand behind all blocks in a
            # cache.
            lent.setdefault(x.writer, Carried()).S = memory
        if x.channels is not None:
            lent.setdefault(x.writer, Carried()).tail = cache[-2 if x.recalls else -1]
        if x.recalls and memory is not None:
            lent.setdefault(x.writer, Carried()).recalled = _recalled(memory, cache[-1], filled)
        return lent

    def _returned(
        self, i: int, done: dict[int, Carried], ordinals: Tensor, valid: Tensor | None
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        x = self.layouts[i]
        own, writer = done[i], done.get(x.writer, Carried())
        cache: list[Tensor | None] = [] if x.kv is None else [own.keys, own.values, ordinals]
        if valid is not None:  # in a cache padding stands before the tokens of a row
            cache = [None if t is None else right_align(t, valid) for t in cache]
        if x.channels is not None:
            cache.append(writer.tail)
        if x.recalls and x.memory is not None and writer.S is not None:
            held = (
                writer.S.new_empty(len(writer.S), 0, *x.memory)
                if writer.recalled is None
                else writer.recalled[:, None]
            )
            cache.append(held.flatten(2).to(x.memory_dtype))
        S = None if x.memory is None or writer.S is None else _recordable(writer.S.to(x.memory_dtype))
        return S, tuple(_recordable(t) for t in cache if t is not None)

    def opened(self, state: State) -> State:
        """Return the state with which a window begins: what is recalled in it are the fast weights of now."""
        layers = list(state.cache.layers)
        for i, x in enumerate(self.layouts):
            S = state.memory.S[i]
            if x.recalls and S is not None and layers[i][-1].shape[1]:
                layers[i] = (*layers[i][:-1], S.flatten(1)[:, None])
        return State(state.memory, replace(state.cache, layers=tuple(layers)))

    def kept_sizes(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Heads and sizes of keys and values that may be kept, for each block; None without attention.

        Raises:
            ValueError: for attention that no key may be added to or taken from: with a window of the model's
                own, over latent keys, or eager, whose queries nobody sees.
        """
        kind = self.model.config.model_type
        if not self.model.config._attn_implementation.startswith("sdpa"):  # that of `cpu_attention` too
            raise ValueError(
                f"{kind} has attn_implementation={self.model.config._attn_implementation!r}, which shows no "
                "queries; load it with attn_implementation='sdpa'"
            )
        sizes: list[tuple[int, int, int] | None] = []
        for i, x in enumerate(self.layouts):
            if x.kv is None:
                sizes.append(None)
                continue
            (heads, key), (others, value) = x.kv
            if x.slides:
                raise ValueError(
                    f"{kind}: block {i} forgets by a sliding window of its own, so it keeps no key"
                )
            if heads != others or self.config.num_attention_heads % heads:
                raise ValueError(
                    f"{kind}: block {i} caches no keys and values by the head, which could be kept"
                )
            if x.turns == "otherwise":
                raise ValueError(f"{kind}: block {i} rotates its keys neither by halves nor in pairs")
            sizes.append((heads, key, value))
        if any(sizes) and self._unlike is not None:
            raise ValueError(f"{kind}: {self._unlike}")
        return tuple(sizes)

    @cached_property
    def _unlike(self) -> str | None:
        """Return why the cached keys are not what attention sees; None if they are."""
        i = next(i for i, x in enumerate(self.layouts) if x.kv)
        h = self.embed(torch.zeros(1, 1, dtype=torch.int64, device=self.device))
        if h.is_meta:  # for costs, nothing has a value
            return None
        h = torch.linspace(-1, 1, h.shape[2], dtype=h.dtype, device=h.device).view_as(h)
        with torch.no_grad(), Listening() as heard:
            _, first = self.run(h, self.initial_state(1), i, i + 1)
        if not heard.calls:
            return f"block {i} calls another attention than scaled_dot_product_attention"
        keys, seen = first.cache.layers[i][0], heard.calls[0][0][1].transpose(1, 2)
        if not torch.equal(seen, keys.repeat_interleave(seen.shape[2] // keys.shape[2], dim=2)):
            return f"block {i} attends to other keys than those that it caches (latent attention)"
        return None

    def turned_back(self, i: int, keys: Tensor, by: Tensor) -> Tensor:
        """Turn keys `[B, t, H, K]` of block i back by `by` `[B, t, H]` positions."""
        turns = self.layouts[i].turns
        if turns is None or turns == "otherwise":
            return keys
        return turned_back(self.model.get_decoder().rotary_emb, turns, keys, by)

    def _by_length(self, valid: Tensor, start: int, stop: int) -> dict[int, Tensor]:
        """Return the numbers of the rows that run together, by the length of the longest of them."""
        padded = not any(x.channels and not x.recalls for x in self.layouts[start:stop])
        counts, rows = (t.tolist() for t in valid.sum(dim=1).sort(descending=True))
        groups: dict[int, list[int]] = {}
        longest = counts[0]
        for place, (count, row) in enumerate(zip(counts, rows, strict=True)):
            # What this row and all shorter ones would be padded by, at the least.
            saved = (len(rows) - place) * (longest - count)
            if saved > (GROUP if padded and count else 0):
                longest = count
            groups.setdefault(longest, []).append(row)
        return {n: torch.tensor(sorted(some), device=valid.device) for n, some in groups.items()}

    def _run_in_groups(
        self,
        h: Tensor,
        state: State,
        start: int,
        stop: int,
        valid: Tensor,
        span: int | None,
        groups: dict[int, Tensor],
    ) -> tuple[Tensor, State]:
        hs, states = [], []
        for count, rows in groups.items():
            x, s = h[rows, :count], state.rows(rows)
            if count:
                x, s = self.run(x, s, start, stop, valid=valid[rows, :count], span=span)
            # Back to T positions; what stands at padding is read by nobody.
            hs.append(nn.functional.pad(x, (0, 0, 0, h.shape[1] - count)))
            states.append(State(s.memory, replace(s.cache, filled=None)))
        # `groups` lists rows by length; argsort is the inverse of that permutation.
        order = torch.cat([*groups.values()]).argsort()
        joined = State.join(states, order)
        cache = replace(joined.cache, filled=state.cache.filled)
        return torch.cat(hs)[order], State(joined.memory, cache)


def _recalled(memory: Tensor, held: Tensor, filled: Tensor | None) -> Tensor:
    """Return what rows recall, `[B, H, K, V]`: what was held for them, or `S` where a window begins."""
    if not held.shape[1]:
        return memory
    begun = held[:, 0].view_as(memory)
    if filled is None:
        return begun
    return torch.where((filled == 0).view(-1, 1, 1, 1), memory, begun)


def _unrecorded(h: Tensor) -> AbstractContextManager[Any]:
    """Return the context for blocks over `h` `[B, T, d]`: one token without gradients takes inference mode.

    There calls cost as much as products, and each costs less where autograd counts no versions.
    """
    one = h.shape[1] == 1 and not torch.is_grad_enabled()
    return torch.inference_mode() if one else nullcontext()


def _recordable(x: Tensor) -> Tensor:
    """Return a tensor that may take part in training later: what inference mode made is copied."""
    # Keys and values are views of buffers that were made outside, and are not.
    return x.clone() if x.is_inference() else x


def call_block(block: Any, h: Tensor, cache: RunCache, where: Positions, mask: Tensor | None) -> Tensor:
    """Call one decoder block on `h` `[B, T, d]` as the model itself would; return the next `h`."""
    options = {} if where.embeddings is None else {"position_embeddings": where.embeddings}
    out = block(
        h,
        attention_mask=mask,
        position_ids=where.position_ids,
        use_cache=True,
        **named(cache),
        **options,
    )
    # Some families return attention weights or the choices of a router beside h.
    return out[0] if isinstance(out, tuple) else out
