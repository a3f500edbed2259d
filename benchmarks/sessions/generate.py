"""A session beside transformers' `generate`, on one model of transformers with the same weights."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from benchmarks.processor import Processor
from benchmarks.table import Cell, Table
from benchmarks.timing import ms, ratio, take_turns
from lmsleep import Session, SleepConfig
from lmsleep.hf import adapt
from lmsleep.hf.cache_name import cache_name, named

PASSES = (1, 2, 4)
VOCAB = 512
CPU = Processor(torch.device("cpu"))


def decoding(
    processor: Processor,
    width: int,
    window: int,
    lengths: tuple[int, ...],
    tokens: int,
    repeats: int,
    blocks: int = 4,
) -> Table:
    """Time greedy tokens after a long text: with its last window (and S) in reach, and with all of it."""
    model, rows = random_model(width, blocks, processor), list[dict[str, Cell]]()
    backbone = adapt(model)
    for length in lengths:
        text = some_text(length + 1).to(processor.device)
        session = Session(backbone, SleepConfig(window=window, passes=1))
        session.read(text[0, :-1])
        cache = prefilled(model, text[:, :-1])
        calls = {
            "ours": partial(session_greedy, session, text, tokens),
            "theirs": partial(greedy, model, cache, text, tokens),
        }
        # Nothing is evicted yet, so both must say the same, but for ties among numbers of few digits.
        if length + tokens < window and processor.dtype == torch.float32:
            assert calls["ours"]() == calls["theirs"]()
        cases = {**calls, "copy": partial(copied, cache)}
        spent = {case: processor.seconds(times) for case, times in take_turns(cases, repeats).items()}
        peer = [a - b for a, b in zip(spent["theirs"], spent["copy"], strict=True)]
        rows.append(
            {
                "tokens before": length,
                f"{processor.clock} ms a token": ms(spent["ours"]) / tokens,
                "of generate": ms(peer) / tokens,
                "times as fast": ratio(peer, spent["ours"]),
                "kept, bytes": session.stats.working_bytes + session.stats.memory_bytes,
                "by generate": _nbytes(cache),
            }
        )
    note = (
        f"{tokens} greedy tokens, one by one, after a text of that many tokens. {about(model)}. Ours: a "
        f"Session with L = {window}, which has slept on all windows but the open one, half full; "
        f"transformers: `generate` with the keys and values of the whole text. {processor.clock} time, "
        f"medians of {repeats} repeats that took turns; ratios within a repeat: median [10th ... 90th "
        "percentile]."
    )
    if processor.dtype == torch.float32:
        note += " Before anything is evicted both give the same answer."
    return Table(rows=rows, note=note)


def session_greedy(session: Session, text: Tensor, tokens: int) -> list[int]:
    """Return the answer of a fork to the last token of `text` `[1, T]`, of which it has read the others."""
    answer = session.fork().generate(text[0, -1:], tokens)
    assert isinstance(answer, list)
    return answer


def greedy(model: Any, cache: Any, text: Tensor, tokens: int) -> list[int]:
    """Return the answer of `generate` after a cache of all but the last token of `text` `[1, T]`."""
    past = copied(cache)  # which it would change; the time of the copy is taken off
    mask = torch.ones_like(text)
    out = model.generate(text, attention_mask=mask, **named(past), max_new_tokens=tokens, do_sample=False)
    answer: list[int] = out[0, text.shape[1] :].tolist()
    return answer


def sleeping(
    processor: Processor, width: int, windows: tuple[int, ...], repeats: int, blocks: int = 4
) -> Table:
    """Time the pause of a sleep against one ordinary pass of transformers over the window's tokens."""
    model, rows = random_model(width, blocks, processor), list[dict[str, Cell]]()
    backbone = adapt(model)
    for L in windows:
        text = some_text(L).to(processor.device)
        calls: dict[int, Any] = {0: partial(prefilled, model, text)}
        for n in PASSES:
            session = Session(backbone, SleepConfig(window=L, passes=n))
            session.read(text[0])
            calls[n] = lambda session=session: session.fork().sleep()
        spent = {n: processor.seconds(times) for n, times in take_turns(calls, repeats).items()}
        rows += [
            {
                "L": L,
                "N": n,
                f"sleep, {processor.clock} ms": ms(spent[n]),
                f"transformers' pass, {processor.clock} ms": ms(spent[0]),
                "passes of transformers that it takes": ratio(spent[n], spent[0]),
            }
            for n in PASSES
        ]
    note = (
        f"A sleep on a full window of L tokens: all N passes and the eviction. {about(model)}. Beside it "
        f"the model's own forward pass over these tokens, with its cache. {processor.clock} time, medians of "
        f"{repeats} repeats that took turns; ratios within a repeat: median [10th ... 90th percentile]."
    )
    return Table(rows=rows, note=note)


copied = copy.deepcopy


@torch.no_grad()
def prefilled(model: Any, text: Tensor) -> Any:
    """Return the cache of a model of transformers that has read a text `[1, T]`."""
    return getattr(model(text, use_cache=True), cache_name())


def some_text(length: int) -> Tensor:
    """Return `[1, length]` tokens."""
    return torch.arange(length)[None] * 7 % VOCAB


def random_model(width: int, blocks: int = 4, processor: Processor = CPU) -> Any:
    """Make a hybrid of transformers: gated delta net and attention in turns, random weights."""
    torch.manual_seed(0)
    heads = width // 64
    config = Qwen3_5TextConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        layer_types=["linear_attention", "full_attention"] * (blocks // 2),
        eos_token_id=None,
        pad_token_id=0,
    )
    with processor.device:  # where billions of numbers are drawn at once
        model = Qwen3_5ForCausalLM(config)
    return model.to(processor.dtype).eval()


def about(model: Any) -> str:
    """Say what a model of transformers is."""
    c, where = model.config, "one thread" if model.device.type == "cpu" else "one GPU"
    return (
        f"{c.num_hidden_layers} blocks of Qwen3.5, width {c.hidden_size}, random weights, "
        f"{str(model.dtype)[6:]}, {where}"
    )


def _nbytes(cache: Any) -> int:
    """Count the bytes of all tensors of a cache of transformers."""
    leaves = tree_leaves([vars(layer) for layer in cache.layers])
    return sum(x.nbytes for x in leaves if isinstance(x, Tensor))
