"""`adapt`: a model of `transformers` becomes a backbone once a trial has shown that it can sleep."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lmsleep import foreign
from lmsleep.hf.backbone import HFBackbone, Layout, call_block
from lmsleep.hf.cache import Carried, RunCache
from lmsleep.hf.insertion import attention_only
from lmsleep.hf.positions import Positions, Turns, turned_back
from lmsleep.state import Cache, Memory, State

TOKENS = 8  # of the trial: enough to be cut into several tokens, several more, and one
CUTS = (TOKENS // 2, TOKENS - 1)
# How far tokens look back, in configurations of transformers. For the trial each is this short at most, so
# that its few tokens see whether a window of thousands is heeded.
REACHES, SHORT = ("sliding_window", "attention_chunk_size"), 3


def adapt(model: Any, *, attention_alone: bool = False) -> HFBackbone:
    """Make a causal language model of `transformers` a backbone of the sleep algorithm.

    The model is not changed, and its weights are shared; what `sleepify` made has its backbone already, which
    is returned. A few tokens are run to see what each block carries, and by the first blocks, of which one of
    each kind is enough, that blocks called one by one compute what the model computes, and that a second call
    goes on from the fast weights that the first left.

    Args:
        model: a hybrid (attention and fast weights) such as qwen3_5, qwen3_next, olmo_hybrid, kimi_linear,
            nemotron_h, bamba, granitemoehybrid, falcon_h1, Jet-Nemotron, or an attention-only model with
            inserted memory layers; `peft` models too.
        attention_alone: take a model without fast weights too. Passes write nothing into it: of a window it
            keeps what an eviction keeps (`Compact`, `Sliding`).

    Raises:
        ValueError: for a model that cannot sleep, with the reason.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(own := getattr(model, "backbone", None), HFBackbone):
        return own
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
        with torch.no_grad(), _short_windows(model.get_decoder().config):
            backbone = _tried(model.eval(), name, attention_alone)
    finally:
        model.train(training)
    return backbone.train(training)


@contextmanager
def _short_windows(config: Any) -> Iterator[None]:
    """Let windows of the model's own be `SHORT` for a while; its masks are made from the configuration."""
    own = {name: reach for name in REACHES if isinstance(reach := getattr(config, name, None), int)}
    for name, reach in own.items():
        setattr(config, name, min(reach, SHORT))
    try:
        yield
    finally:
        for name, reach in own.items():
            setattr(config, name, reach)


def _tried(model: Any, name: str, attention_alone: bool) -> HFBackbone:
    """Return the backbone of a model in evaluation mode; raise ValueError where the trial fails."""
    vocabulary: int = model.config.get_text_config().vocab_size
    tokens = torch.arange(TOKENS, device=model.get_input_embeddings().weight.device)[None] % vocabulary
    try:
        like = _alike(model)
        shown = max(like) + 1  # blocks that have one of each kind among them
        with _only(shown, model.get_decoder()):
            slide = _sliding(HFBackbone(model, ()), tokens)
        layouts = _layouts(model, tokens, like, slide)
        with _only(shown, model.get_decoder()):
            reason = _reason_against(HFBackbone(model, layouts[:shown]), tokens, attention_alone)
    except ValueError as error:
        raise ValueError(f"model: {name} cannot sleep: {error}") from error
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of code that was never meant to be called so, and of odd configurations
        raise ValueError(
            f"model: {name} cannot sleep: its blocks do not run one by one ({foreign.reason(error)})"
        ) from error
    if reason is not None:
        raise ValueError(f"model: {name} cannot sleep: {reason}")
    return HFBackbone(model, layouts)


def _alike(model: Any) -> list[int]:
    """Return for each block the first that is like it: of the same parts, options and shapes."""
    first: dict[Any, int] = {}
    kinds = getattr(model.get_decoder().config, "layer_types", None)
    blocks = model.get_decoder().layers
    return [
        first.setdefault((_made_of(block), kinds[i] if kinds else None), i) for i, block in enumerate(blocks)
    ]


def _made_of(block: Any) -> tuple[Any, ...]:
    """Describe a block by all that tells it from others, but for its place and the values of its weights."""
    parts = []
    for name, part in block.named_modules():
        options = {k: v for k, v in vars(part).items() if isinstance(v, (bool, int, float, str))}
        options.pop("layer_idx", None)
        shapes = [(k, p.shape, p.dtype) for k, p in part.named_parameters(recurse=False)]
        parts.append((name, type(part), *options.items(), *shapes))
    return tuple(parts)


@contextmanager
def _only(count: int, decoder: Any) -> Iterator[None]:
    """Let a decoder have its first `count` blocks alone for a while; they need none of those behind them."""
    blocks = decoder.layers
    decoder.layers = blocks[:count]
    try:
        yield
    finally:
        decoder.layers = blocks


def _layouts(model: Any, tokens: Tensor, like: list[int], slide: set[int]) -> list[Layout]:
    """Run blocks on nothing before and see what each leaves: so no family has to be known by name.

    A block leaves what the first that is like it does, whose weights alone have to be read; but where a cache
    does not number what it leaves by the block, only a run tells the number. How keys turn the first shows.
    """
    scout = HFBackbone(model, ())
    h, found = scout.embed(tokens), list[Layout]()
    where = Positions(model, h, State(Memory(()), Cache(())), (), 0, 0)
    for i, block in enumerate(scout.blocks):
        first = like[i]
        if first < i and found[first].writer in (first, -1) and _numbered_by_block(scout.blocks, first, i):
            found.append(replace(found[first], writer=-1 if found[first].writer == -1 else i))
            continue
        cache, later = RunCache({}), RunCache({})
        after = call_block(block, h, cache, where, None)
        layout = _layout(i, cache.finished(), model.dtype, first in slide)
        if first < i:
            layout = replace(layout, turns=found[first].turns)
        elif layout.kv is not None:
            call_block(block, h, later, where.later(TOKENS), None)
            keys, moved = cache.finished()[i].keys, later.finished()[i].keys
            assert keys is not None and moved is not None
            layout = replace(layout, turns=_turns(where.rotary, keys, moved))
        found.append(layout)
        h = after
    return found


def _numbered_by_block(blocks: Any, first: int, i: int) -> bool:
    """Say whether a cache numbers the parts of two like blocks as far apart as the blocks are."""
    before, own = (
        [n for part in blocks[j].modules() if isinstance(n := getattr(part, "layer_idx", None), int)]
        for j in (first, i)
    )
    return own == [number + i - first for number in before]


def _turns(rotary: Any, keys: Tensor, later: Tensor) -> Turns | Literal["otherwise"] | None:
    """Return how a block turned its keys `[1, T, H, K]`, given those of the same tokens `TOKENS` later."""
    by = torch.full((1, 1, 1), TOKENS, device=keys.device)
    frequencies = getattr(rotary, "inv_freq", keys.new_empty(0))
    fits = 0 < 2 * len(frequencies) <= keys.shape[3]
    backs: dict[Turns | None, Tensor] = {None: later}
    backs |= {way: turned_back(rotary, way, later, by) for way in get_args(Turns) if fits}

    def miss(way: Turns | None) -> float:
        # Number by number: a few are far larger in some models, and those hardly turn.
        error, size = (t.abs().amax(dim=(0, 1, 2)).float() for t in (backs[way] - keys, keys))
        return float((error / size.clamp(min=1e-20)).mean())

    best = min(backs, key=miss)
    return best if _close(backs[best], keys) else "otherwise"


def _sliding(scout: HFBackbone, tokens: Tensor) -> set[int]:
    """Return the blocks whose last token is not shown the first, by the masks that the model gives them."""
    found: set[int] = set()

    def look(i: int, block: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        mask = options.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 4:
            first = mask[0, 0, -1, 0]
            if bool(~first if first.dtype == torch.bool else first < 0):  # eager attention adds its mask
                found.add(i)

    hooks = [
        block.register_forward_pre_hook(partial(look, i), with_kwargs=True)
        for i, block in enumerate(scout.blocks)
    ]
    try:
        scout.model.get_decoder()(tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _layout(i: int, done: dict[int, Carried], dtype: torch.dtype, slides: bool) -> Layout:
    """Describe what block i left; fast weights may belong to a layer of another number than the block's."""
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
        slides=slides and kv is not None,
        recalls=writer.recalled is not None,
    )


def _reason_against(backbone: HFBackbone, tokens: Tensor, attention_alone: bool) -> str | None:
    """Return why the model cannot sleep, None if it can."""
    if all(x.memory is None for x in backbone.layouts) and not (
        attention_alone and attention_only(backbone.config)
    ):
        if attention_only(backbone.config):
            return (
                "no block has fast weights to write to; add some with lmsleep.hf.insert_memory_layers, or "
                "adapt it with attention_alone=True for an eviction that keeps keys and values (Compact)"
            )
        return (
            "none of its recurrent blocks keeps fast weights (a matrix per head) where transformers keeps "
            "keys and values, as those of hybrids do (bamba, qwen3_5 ...)"
        )
    logits = backbone.model(tokens, use_cache=False).logits
    h, whole = _read(backbone, tokens)
    if not _close(backbone.head(h), logits):
        return "its blocks called one by one do not compute what the model computes"
    h_of_parts, parts = _read(backbone, tokens, *CUTS)
    if not _close(backbone.head(h_of_parts), logits):
        return "tokens in several calls give another result than in one: it loses its state between calls"
    return _ignored_memory(backbone, h, whole, parts)


def _ignored_memory(backbone: HFBackbone, h: Tensor, whole: State, parts: State) -> str | None:
    """Return a reason if a block goes on from S = 0 whatever fast weights it is given.

    A kernel for several tokens may begin with S = 0 where the one for a single token goes on from what was
    left, and logits need not show it; but then every pass over a window would start from nothing.

    Args:
        backbone: the model.
        h: hidden states `[1, T, d]`, given to each block alone.
        whole: what a reading in one call left.
        parts: what a reading in several calls left.
    """
    empty = backbone.initial_state(1)
    ones = empty.memory.map(torch.ones_like)
    for i, x in enumerate(backbone.layouts):
        if x.memory is None:
            continue
        said_by_ones, from_ones = backbone.run(h, State(ones, empty.cache), i, i + 1)
        said_by_zeros, from_zeros = backbone.run(h, empty, i, i + 1)
        if not torch.equal(said_by_ones, said_by_zeros):
            continue
        # What it says does not tell: a block that was just inserted says nothing yet. What it writes does.
        # Compared in the model's dtype, for S may be kept in a finer one than it is computed in.
        S = [state.memory.S[i] for state in (from_ones, from_zeros, whole, parts)]
        by_ones, by_zeros, at_once, in_parts = (t.to(x.dtype) for t in S if t is not None)
        if torch.equal(by_ones, by_zeros) or not _close(in_parts, at_once):
            return f"block {i} ignores the fast weights that it is given with several tokens at once"
    return None


def _read(backbone: HFBackbone, tokens: Tensor, *cuts: int) -> tuple[Tensor, State]:
    """Run all blocks over `tokens` `[1, T]`, cut at `cuts`; return `h` `[1, T, d]` and the state left."""
    state, hs = backbone.initial_state(1), []
    for part in tokens.tensor_split(cuts, dim=1):
        h, state = backbone.run(backbone.embed(part), state, 0, backbone.num_blocks)
        hs.append(h)
    return torch.cat(hs, dim=1), state


def _close(a: Tensor, b: Tensor) -> bool:
    """Compare by the largest number: kernels differ in their last digits, a lost state in the first."""
    tolerance = 1e-3 if a.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((a - b).abs().max() <= tolerance * b.abs().max())
