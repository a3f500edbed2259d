"""`adapt`: a pretrained hybrid of `transformers` as a backbone of the sleep algorithm, its code untouched."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lmsleep.hf.cache import Carried, RunCache
from lmsleep.layers.attention import visible
from lmsleep.state import Cache, Memory, State

NORMS = ("norm", "final_layernorm", "norm_f")  # what families call the norm before the head
REBASE_AFTER = 1 << 15  # positions count from the oldest visible key again when they have grown so large
PROBE = 8  # tokens of the probe


@dataclass(frozen=True)
class Layout:
    """What one block carries, a row: sizes and dtypes.

    Attributes:
        memory: `S`, of the layer with number `writer`; None for a block without fast weights.
        writer: `layer_idx` of the layer in the block that has the fast weights.
        kv: heads and sizes of keys and values; None for a block without attention.
        channels: of the short convolution; None for none.
        dtype: of keys, values and convolution.
        memory_dtype: of `S`.
    """

    memory: tuple[int, int, int] | None
    writer: int
    kv: tuple[tuple[int, int], tuple[int, int]] | None
    channels: int | None
    dtype: torch.dtype
    memory_dtype: torch.dtype


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
        """That of the text model."""
        return self.model.config.get_text_config()

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks themselves."""
        blocks: nn.ModuleList = self.model.get_decoder().layers
        return blocks

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""
        return len(self.blocks)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What each block is made of: "attention", "fast_weights", both joined by "+", or "mlp"."""
        parts = (
            "+".join(name for name, has in (("attention", x.kv), ("fast_weights", x.memory)) if has)
            for x in self.layouts
        )
        return tuple(part or "mlp" for part in parts)

    def initial_state(self, batch_size: int) -> State:
        """`S = 0` and nothing in the working memory."""
        device = self.model.get_input_embeddings().weight.device

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(batch_size, *shape, dtype=dtype, device=device)

        memory, cache = [], []
        for x in self.layouts:
            memory.append(None if x.memory is None else empty(*x.memory, dtype=x.memory_dtype))
            tensors = []
            if x.kv is not None:
                tensors += [empty(0, *size, dtype=x.dtype) for size in x.kv]
                tensors.append(empty(0, dtype=torch.int64))
            if x.channels is not None:
                tensors.append(empty(0, x.channels, dtype=x.dtype))
            cache.append(tuple(tensors))
        return State(Memory(tuple(memory)), Cache(tuple(cache)))

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, T]` (int64) -> hidden states `h` `[B, T, d]`, scaled as the model scales them."""
        h: Tensor = self.model.get_input_embeddings()(tokens)
        scale = getattr(self.model.get_decoder(), "embedding_multiplier", None)
        return h if scale is None else h * scale

    def head(self, h: Tensor) -> Tensor:
        """Hidden states `[B, T, d]` -> logits `[B, T, V]`, scaled as the model scales them."""
        decoder = self.model.get_decoder()
        norm = next(getattr(decoder, name) for name in NORMS if hasattr(decoder, name))
        logits: Tensor = self.model.get_output_embeddings()(norm(h))
        if (divisor := getattr(self.config, "logits_scaling", None)) is not None:
            logits = logits / divisor
        if (factor := getattr(decoder, "lm_head_multiplier", None)) is not None:
            logits = logits * factor
        return logits

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
        """Blocks `start ... stop - 1`; arguments and result as for `HybridLM.run`.

        Padding is never shown to a block, for recurrences of `transformers` would forget on it: rows of
        different length run one length after the other.

        Raises:
            ValueError: if the model's own gradient checkpointing is on, which drops the state of every block.
        """
        if start == stop:  # before and after a loop over all blocks: no rows to sort, no masks to make
            return h, state
        if valid is not None and not bool(valid.all()):
            return self._run_by_length(h, state, start, stop, valid, span)
        if not h.shape[1]:  # kernels of transformers want a token
            return h, state
        blocks = self.blocks
        if any(b.training and getattr(b, "gradient_checkpointing", False) for b in blocks[start:stop]):
            raise ValueError(
                "the model's own checkpointing of activations (gradients) drops what every block carries, "
                "so nothing would be remembered; switch it off and use checkpoint=True of sleep_forward"
            )
        where = _Positions(self.model, h, state, self.layouts, start, stop)
        carried: dict[int, Carried] = {}
        for i in range(start, stop):
            carried |= self._lend(i, state.memory.S[i], where.rebased(i))
        cache = RunCache(carried)
        for i in range(start, stop):
            limit = _sliding(blocks[i], span)
            h = _call(blocks[i], h, cache, where, where.mask(limit) if self.layouts[i].kv else None)
        done = cache.finished()
        return h, state.replace(start, [self._returned(i, done, where.ordinals) for i in range(start, stop)])

    def _lend(self, i: int, memory: Tensor | None, cache: tuple[Tensor, ...]) -> dict[int, Carried]:
        x, lent = self.layouts[i], {i: Carried()}
        if x.kv is not None:
            lent[i].keys, lent[i].values = cache[:2]
        if x.memory is not None:
            lent.setdefault(x.writer, Carried()).S = memory
        if x.channels is not None:
            lent.setdefault(x.writer, Carried()).tail = cache[-1]
        return lent

    def _returned(
        self, i: int, done: dict[int, Carried], ordinals: Tensor
    ) -> tuple[Tensor | None, tuple[Tensor, ...]]:
        x = self.layouts[i]
        own, writer = done[i], done.get(x.writer, Carried())
        cache: list[Tensor | None] = [] if x.kv is None else [own.keys, own.values, ordinals]
        if x.channels is not None:
            cache.append(writer.tail)
        S = None if x.memory is None or writer.S is None else writer.S.to(x.memory_dtype)
        return S, tuple(t for t in cache if t is not None)

    def _run_by_length(
        self, h: Tensor, state: State, start: int, stop: int, valid: Tensor, span: int | None
    ) -> tuple[Tensor, State]:
        counts, T = valid.sum(dim=1), h.shape[1]
        hs, states, groups = [], [], []
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero()[:, 0]
            x, s = h[rows, :count], state.rows(rows)
            if count:
                x, s = self.run(x, s, start, stop, span=span)
            hs.append(nn.functional.pad(x, (0, 0, 0, T - count)))
            states.append(State(s.memory, replace(s.cache, filled=None)))
            groups.append(rows)
        order = torch.cat(groups).argsort()
        joined = State.join(states, order)
        cache = replace(joined.cache, filled=state.cache.filled)
        return torch.cat(hs)[order], State(joined.memory, cache)


class _Positions:
    """Positions and masks of one run."""

    def __init__(
        self, model: Any, h: Tensor, state: State, layouts: Sequence[Layout], start: int, stop: int
    ) -> None:
        B, T = h.shape[:2]
        self.state, self.layouts, self.h = state, layouts, h
        self.rotary = getattr(model.get_decoder(), "rotary_emb", None)
        self.eager = model.config._attn_implementation == "eager"
        first = next((i for i in range(start, stop) if layouts[i].kv), None)
        old = h.new_zeros(B, 0, dtype=torch.int64) if first is None else state.cache.layers[first][2]
        self.past = old.shape[1]
        far = self.past > 0 and self.rotary is not None and not old.is_meta  # where nothing has a value
        far = far and bool((old[:, 0] > REBASE_AFTER).any())
        self.shift = (old[:, :1] - 1).clamp(min=0) if far else None
        if self.shift is not None:
            old = (old - self.shift).clamp(min=0)
        last = old[:, -1:] if self.past else old.new_zeros(B, 1)
        new = last + torch.arange(1, T + 1, device=h.device)
        self.ordinals, self.position_ids = torch.cat([old, new], dim=1), new - 1
        self.embeddings = None if self.rotary is None else self.rotary(h, self.position_ids)
        self._masks: dict[int | None, Tensor | None] = {}

    def rebased(self, i: int) -> tuple[Tensor, ...]:
        """The working memory of block i, its keys turned back by `shift` positions."""
        cache = self.state.cache.layers[i]
        if self.shift is None or self.rotary is None or self.layouts[i].kv is None:
            return cache
        cos, sin = (t.unsqueeze(2) for t in self.rotary(self.h, self.shift))  # [B, 1, 1, rotary size]
        size, scale = cos.shape[-1], getattr(self.rotary, "attention_scaling", 1.0)
        turned, plain = cache[0].split([size, cache[0].shape[-1] - size], dim=-1)
        a, b = turned.chunk(2, dim=-1)
        turned = (turned * cos - torch.cat([-b, a], dim=-1) * sin) / scale**2
        return torch.cat([turned, plain], dim=-1), *cache[1:]

    def mask(self, span: int | None) -> Tensor | None:
        """What each token sees; None where that is all before it, as `transformers` says it."""
        if span not in self._masks:
            self._masks[span] = self._mask(span)
        return self._masks[span]

    def _mask(self, span: int | None) -> Tensor | None:
        T, past, filled = self.h.shape[1], self.past, self.state.cache.filled
        all_before = past == 0 or (T == 1 and filled is None)
        if all_before and (span is None or past + T <= span) and (not self.eager or T == 1):
            return None
        seen = visible(T, past, span, filled if past else None, self.h.device)
        seen = seen.expand(len(self.h), 1, T, past + T)
        if not self.eager:
            return seen
        return torch.zeros_like(seen, dtype=self.h.dtype).masked_fill(~seen, torch.finfo(self.h.dtype).min)


def adapt(model: Any) -> HFBackbone:
    """Make a causal language model of `transformers` a backbone of the sleep algorithm.

    The model is not changed, and its weights are shared. A few tokens are run to see what each block carries,
    that the blocks called one by one compute what the model computes, and that a second call goes on from
    the fast weights that the first left.

    Args:
        model: a hybrid (attention and fast weights) such as qwen3_5, qwen3_next, olmo_hybrid, kimi_linear,
            nemotron_h, bamba, granitemoehybrid, falcon_h1, Jet-Nemotron, or an attention-only model with
            inserted memory layers; `peft` models too.

    Raises:
        ValueError: for a model that cannot sleep, with the reason.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if not hasattr(model, "get_decoder") or not hasattr(model.get_decoder(), "layers"):
        raise ValueError(f"model: {name} is no decoder with a list of blocks, so it cannot be adapted")
    attention = model.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(
            f"model: attn_implementation={attention!r} cannot be told what an evicted window hides; load the "
            "model with attn_implementation='sdpa' (whole windows run on flash kernels there too)"
        )
    if (steps := getattr(model.config, "total_ut_steps", 1)) > 1:
        raise ValueError(
            f"model: {name} makes total_ut_steps={steps} passes over every token while awake; set "
            "model.config.total_ut_steps = 1 and make passes by SleepConfig (passes, wake_passes)"
        )
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    if (kind := getattr(rotary, "rope_type", "default")) in ("dynamic", "longrope"):
        raise ValueError(
            f"model: rope_type={kind!r} rotates by the length of the text; sleep needs one without"
        )
    training = model.training
    try:
        with torch.no_grad():
            backbone = _probed(model.eval(), name)
    finally:
        model.train(training)
    return backbone.train(training)


def _probed(model: Any, name: str) -> HFBackbone:
    tokens = torch.arange(PROBE, device=model.get_input_embeddings().weight.device)[None] % _vocab(model)
    try:
        backbone = HFBackbone(model, _layouts(model, tokens))
        reason = _reason_against(backbone, tokens)
    except ValueError as error:
        raise ValueError(f"model: {name} cannot sleep: {error}") from error
    except (TypeError, AttributeError, LookupError, RuntimeError) as error:
        raise ValueError(
            f"model: {name} cannot sleep: its blocks do not run one by one ({type(error).__name__}: {error})"
        ) from error
    if reason is not None:
        raise ValueError(f"model: {name} cannot sleep: {reason}")
    return backbone


def _layouts(model: Any, tokens: Tensor) -> list[Layout]:
    """What blocks carry, as seen when they run for the first time."""
    scout = HFBackbone(model, ())
    h, found = scout.embed(tokens), []
    where = _Positions(model, h, State(Memory(()), Cache(())), (), 0, 0)
    for i, block in enumerate(scout.blocks):
        cache = RunCache({})
        h = _call(block, h, cache, where, None)
        found.append(_layout(i, cache.finished(), model.dtype))
    return found


def _layout(i: int, done: dict[int, Carried], dtype: torch.dtype) -> Layout:
    own = done.get(i, Carried())
    writers = [j for j, c in done.items() if c.S is not None]
    if len(writers) > 1:
        raise ValueError(f"block {i} has {len(writers)} layers with fast weights")
    writer = done[writers[0]] if writers else Carried()
    S, tail, kv = writer.S, writer.tail, None
    if S is not None and S.ndim != 4:
        raise ValueError(f"block {i} has fast weights of shape {tuple(S.shape)}, not a matrix per head")
    if own.keys is not None and own.values is not None:
        kv = (own.keys.shape[2], own.keys.shape[3]), (own.values.shape[2], own.values.shape[3])
    return Layout(
        memory=None if S is None else (S.shape[1], S.shape[2], S.shape[3]),
        writer=writers[0] if writers else -1,
        kv=kv,
        channels=None if tail is None else tail.shape[2],
        dtype=dtype,
        memory_dtype=torch.float32 if S is None else S.dtype,
    )


def _reason_against(backbone: HFBackbone, tokens: Tensor) -> str | None:
    """Why the model cannot sleep, None if it can."""
    D = backbone.num_blocks
    if all(x.memory is None for x in backbone.layouts):
        return "no block has fast weights to write to; add some with lmsleep.hf.insert_memory_layers"
    plain = backbone.model(tokens, use_cache=False).logits
    empty = backbone.initial_state(1)
    whole, after = backbone.run(backbone.embed(tokens), empty, 0, D)
    if not _close(backbone.head(whole), plain):
        return "its blocks called one by one do not compute what the model computes"
    h, cut = backbone.run(backbone.embed(tokens[:, : PROBE // 2]), empty, 0, D)
    parts = [h]
    for a, b in ((PROBE // 2, PROBE - 1), (PROBE - 1, PROBE)):
        h, cut = backbone.run(backbone.embed(tokens[:, a:b]), cut, 0, D)
        parts.append(h)
    if not _close(backbone.head(torch.cat(parts, dim=1)), plain):
        return "tokens in several calls give another result than in one: it loses its state between calls"
    for i, x in enumerate(backbone.layouts):
        if x.memory is None:
            continue
        full = empty.memory.map(torch.ones_like)
        filled, of_full = backbone.run(whole, State(full, empty.cache), i, i + 1)
        unfilled, of_empty = backbone.run(whole, empty, i, i + 1)
        if not torch.equal(filled, unfilled):
            continue
        # What it says does not tell: it was just inserted and says nothing yet. What it writes does.
        S = [s.memory.S[i] for s in (of_full, of_empty, after, cut)]
        from_full, from_empty, once, in_parts = (t.to(x.dtype) for t in S if t is not None)
        if torch.equal(from_full, from_empty) or not _close(in_parts, once):
            return f"block {i} ignores the fast weights that it is given with several tokens at once"
    return None


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-3 if a.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


def _vocab(model: Any) -> int:
    size: int = model.config.get_text_config().vocab_size
    return size


def _sliding(block: Any, span: int | None) -> int | None:
    """How far the block's tokens look back: `span`, or its own window if that is shorter."""
    attention = getattr(block, "self_attn", None)
    own = getattr(attention, "sliding_window", None)
    named = ((block, "block_type"), (block, "attention_type"), (attention, "layer_type"))
    kinds = [getattr(place, name, None) for place, name in named]
    if "sliding_attention" not in kinds or own is None:
        return span
    return own if span is None else min(own, span)


def _call(block: Any, h: Tensor, cache: RunCache, where: _Positions, mask: Tensor | None) -> Tensor:
    options = {} if where.embeddings is None else {"position_embeddings": where.embeddings}
    out = block(
        h,
        attention_mask=mask,
        position_ids=where.position_ids,
        past_key_values=cache,
        use_cache=True,
        **options,
    )
    return out[0] if isinstance(out, tuple) else out
