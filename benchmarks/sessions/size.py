"""Bytes that are carried from token to token, against the length of the context: measured, and by formula."""

from dataclasses import dataclass, replace

import torch

from benchmarks.table import Cell, Table
from lmsleep import HybridConfig, HybridLM, Session, SleepConfig

PIECE = 512  # tokens read at a time, which bounds the scores of attention


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes that the bytes of a model depend on."""

    layers: int
    """With fast weights."""
    heads: int
    """Of fast weights, in each of these layers."""
    key: int
    """K: rows of a head's S."""
    value: int
    """V: its columns."""
    attention: int
    """Layers with keys and values; each step of a loop counts."""
    kv_heads: int
    """Heads that keep keys and values."""
    head_dim: int
    """Numbers in a key, and in a value."""

    @classmethod
    def of(cls, config: HybridConfig) -> "Shape":
        """Take the shape of a model of this library without overrides."""
        attention = config.blocks.count("attention")
        return cls(
            layers=len(config.blocks) - attention,
            heads=config.num_heads,
            key=config.key_dim,
            value=config.value_dim or config.key_dim,
            attention=attention,
            kv_heads=config.num_kv_heads or config.num_heads,
            head_dim=config.key_dim,
        )

    @property
    def memory_bytes(self) -> int:
        """Return the bytes of the fast weights of one sequence, in float32."""
        return 4 * self.layers * self.heads * self.key * self.value

    def kv_bytes(self, number: int = 2) -> int:
        """Return the bytes of keys and values of one token, at `number` bytes a number: 2 in bfloat16."""
        return 2 * self.attention * self.kv_heads * self.head_dim * number

    @property
    def break_even(self) -> int:
        """Return the number of tokens from which on keys and values take more than the fast weights."""
        return self.memory_bytes // self.kv_bytes() + 1


QWEN = Shape(layers=24, heads=32, key=128, value=128, attention=8, kv_heads=4, head_dim=256)
JET = Shape(layers=24, heads=12, key=96, value=256, attention=2, kv_heads=2, head_dim=128)
OURO = Shape(layers=6, heads=12, key=96, value=256, attention=24, kv_heads=16, head_dim=128)
PUBLISHED = {
    "Qwen3.5 (default configuration of transformers 5.23)": QWEN,
    "Jet-Nemotron 2B": JET,
    "Ouro 1.4B and 6 inserted layers, one loop step": OURO,
    "the same, all 4 loop steps": replace(OURO, attention=4 * OURO.attention),
}


def by_formula() -> Table:
    """Compute bytes of models that were not run here, from their published configurations."""
    rows: list[dict[str, Cell]] = [
        {
            "model": name,
            "fast weights S": f"{s.layers} layers x {s.heads} x {s.key} x {s.value}",
            "their bytes": s.memory_bytes,
            "keys and values": f"{s.attention} layers x 2 x {s.kv_heads} x {s.head_dim}",
            "bytes a token": s.kv_bytes(),
            "break-even, tokens": s.break_even,
            "cache of 32,768 tokens": 32_768 * s.kv_bytes(),
            "of 1,000,000": 1_000_000 * s.kv_bytes(),
        }
        for name, s in PUBLISHED.items()
    ]
    note = (
        "By formula, nothing measured: S in float32, keys and values in bfloat16, one sequence. A sleeping "
        "model carries S and at most L tokens of keys and values. Break-even: from there on a whole cache is "
        "larger than S. Left out: Jet-Nemotron's two layers of sliding attention (at most 1,152 tokens, "
        "2.4 MB) and the tails of short convolutions. That the layers inserted into Ouro have Jet-Nemotron's "
        "shape is a guess; the paper does not give it."
    )
    return Table(rows=rows, note=note)


def measured(config: HybridConfig, window: int, lengths: tuple[int, ...]) -> Table:
    """Measure a hybrid that sleeps beside a transformer that keeps its cache, both reading the same."""
    transformer = replace(config, blocks=("attention",) * len(config.blocks))
    asleep = Session(HybridLM(config), SleepConfig(window=window, passes=2))
    awake = Session(HybridLM(transformer), SleepConfig(window=None))
    rows: list[dict[str, Cell]] = []
    for length in lengths:
        for session in (asleep, awake):
            for piece in torch.zeros(length - session.stats.tokens, dtype=torch.int64).split(PIECE):
                session.read(piece)
        sleeping, whole = asleep.stats, awake.stats
        rows.append({
            "tokens read": length,
            "sleeping: fast weights": sleeping.memory_bytes,
            "working memory": sleeping.working_bytes,
            "most so far": sleeping.peak_bytes,
            "transformer: whole cache": whole.working_bytes,
            "cache / sleeping": whole.working_bytes / (sleeping.memory_bytes + sleeping.working_bytes),
        })  # fmt: skip
    note = (
        f"Measured, bytes in float32: blocks {' and '.join(config.blocks)} of width {config.d_model}, "
        f"L = {window} (the window is full at these lengths); the transformer has attention in all blocks."
    )
    return Table(rows=rows, note=note)
