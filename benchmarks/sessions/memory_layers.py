"""An attention-only model with memory layers: a session beside transformers' `generate`, and opening it."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.sessions.generate import CPU, copied, greedy, prefilled, session_greedy, some_text
from benchmarks.table import Cell, Table
from benchmarks.timing import ms, ratio, take_turns
from lmsleep import Session, SleepConfig
from lmsleep.hf import adapt, insert_memory_layers

SMOL = LlamaConfig(  # of SmolLM2-135M
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    tie_word_embeddings=True,
    eos_token_id=None,
    pad_token_id=0,
)
TINY = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    eos_token_id=None,
    pad_token_id=0,
)


def tables(repeats: int, tiny: bool) -> dict[str, Callable[[], Table]]:
    """Return both tables."""
    config, layers, window, lengths, tokens = (
        (TINY, 1, 16, (4,), 4) if tiny else (SMOL, 6, 1024, (256, 1280, 2560), 32)
    )
    often = repeats if tiny else 2 * repeats
    return {
        "memory-layers": lambda: decoding(config, layers, window, lengths, tokens, often),
        "opening": lambda: opening(config, layers, often),
    }


def decoding(
    config: LlamaConfig, layers: int, window: int, lengths: tuple[int, ...], tokens: int, repeats: int
) -> Table:
    """Time greedy tokens of a session, of `generate` on the same layers, and of the model without them."""
    plain, model = _random(config), _random(config)
    kind = insert_memory_layers(model, layers).kind
    backbone, rows = adapt(model), list[dict[str, Cell]]()
    for length in lengths:
        text = some_text(length + 1)
        session = Session(backbone, SleepConfig(window=window, passes=1))
        session.read(text[0, :-1])
        caches = {"same": prefilled(model, text[:, :-1]), "plain": prefilled(plain, text[:, :-1])}
        cases: dict[str, Any] = {
            "ours": partial(session_greedy, session, text, tokens),
            "same": partial(greedy, model, caches["same"], text, tokens),
            "plain": partial(greedy, plain, caches["plain"], text, tokens),
        }
        if length + tokens < window:  # a new memory layer adds zero: all three say the same
            assert cases["ours"]() == cases["same"]() == cases["plain"]()
        cases |= {f"copy of {name}": partial(copied, cache) for name, cache in caches.items()}
        spent = {case: CPU.seconds(times) for case, times in take_turns(cases, repeats).items()}
        peers = {
            name: [a - b for a, b in zip(spent[name], spent[f"copy of {name}"], strict=True)]
            for name in caches
        }
        rows.append(
            {
                "tokens before": length,
                "CPU ms a token": ms(spent["ours"]) / tokens,
                "of generate, same layers": ms(peers["same"]) / tokens,
                "times as fast": ratio(peers["same"], spent["ours"]),
                "of generate without memory layers": ms(peers["plain"]) / tokens,
                "times as fast as that": ratio(peers["plain"], spent["ours"]),
            }
        )
    note = (
        f"{tokens} greedy tokens, one by one, after a text of that many tokens. {_about(config)}, {layers} "
        f"memory layers ({kind}), one thread. Ours: a Session with L = {window}; transformers: `generate` "
        "with the keys and values of the whole text, on the same model and on the one without memory "
        f"layers. CPU time, medians of {repeats} repeats that took turns; ratios within a repeat: median "
        "[10th ... 90th percentile]. Before anything is evicted all three give the same answer."
    )
    return Table(rows=rows, note=note)


ROOT = Path(__file__).parents[2]

# In a process of its own: what it takes to have a model, and then its first token.
OPENED = """
import json, sys, time, torch, lmsleep.hf, lmsleep.hf.jet_nemotron, lmsleep.hf.kind, lmsleep.hf.sleeping
import transformers.models.llama.modeling_llama
from benchmarks.sessions.stream import peak_resident
from lmsleep.opening import open_backbone
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
begin = time.process_time()
if sys.argv[1] == "ours":
    model = open_backbone(sys.argv[2], "cpu")[0]
    opened, model = time.process_time() - begin, model.model
else:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[2])
    opened = time.process_time() - begin
with torch.no_grad():
    model(torch.ones(1, 1, dtype=torch.int64))
spent = time.process_time() - begin
print(json.dumps([opened, spent, peak_resident() / 1e6]))
"""


def opening(config: LlamaConfig, layers: int, repeats: int) -> Table:
    """Time the opening of a folder by lmsleep, beside transformers' of the same without memory layers."""
    found: dict[str, list[list[float]]] = {"transformers": [], "ours": []}
    with TemporaryDirectory() as place:
        model = _random(config)
        model.save_pretrained(Path(place) / "transformers")
        insert_memory_layers(model, layers)
        model.save_pretrained(Path(place) / "ours")
        for _ in range(repeats):
            for who, said in found.items():
                command = [sys.executable, "-W", "ignore", "-c", OPENED, who, str(Path(place) / who)]
                said.append(json.loads(subprocess.check_output(command, text=True, cwd=ROOT)))
    theirs = [*zip(*found["transformers"], strict=True)]
    rows: list[dict[str, Cell]] = []
    for who, said in found.items():
        opened, first, peak = zip(*said, strict=True)
        rows.append(
            {
                "opened by": who,
                "CPU ms": ms([*opened]),
                "to transformers": ratio([*opened], [*theirs[0]]),
                "with its first token, CPU ms": ms([*first]),
                "to transformers with its first": ratio([*first], [*theirs[1]]),
                "peak resident, MB": median(peak),
                "peak to transformers": ratio([*peak], [*theirs[2]]),
            }
        )
    note = (
        f"A folder opened in a new process, imports not counted. {_about(config)}, one thread. transformers: "
        f"`from_pretrained` of the model without memory layers; ours: `lmsleep.open` of it with {layers}, "
        "which tries whether the model can sleep. Weights are mapped, and read from the file's pages when "
        f"they are first used. Medians of {repeats} repeats that took turns; ratios within a repeat: median "
        "[10th ... 90th percentile]."
    )
    return Table(rows=rows, note=note)


def _random(config: LlamaConfig) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(type(config)(**config.to_dict())).eval()


def _about(config: LlamaConfig) -> str:
    name = "a Llama of SmolLM2-135M's sizes" if config is SMOL else "a small Llama"
    return (
        f"{name} ({config.num_hidden_layers} blocks of width {config.hidden_size}), random weights, float32"
    )
