"""Sessions measured: what waking and sleeping cost in time, what is carried in bytes, what memories keep."""

from collections.abc import Callable

from benchmarks.sessions import generate, memories, memory_layers, size, speed, stream
from benchmarks.table import Table
from lmsleep import HybridConfig

SMALL = HybridConfig(d_model=64, blocks=("attention", "gated_delta_net"))
MIDDLE = HybridConfig()  # four blocks of width 256: 3 million parameters

LARGE = HybridConfig(  # 2 billion parameters, of which six blocks have fast weights
    vocab_size=98_304,
    d_model=2048,
    num_heads=16,
    head_dim=128,
    blocks=(*["attention"] * 3, "gated_delta_net") * 6,
    mlp_dim=8192,
)


def tables(repeats: int, tiny: bool) -> dict[str, Callable[[], Table]]:
    """Return all tables; times come from models with random weights, accuracies from the shipped ones."""
    model, often = (SMALL, repeats) if tiny else (MIDDLE, 20 * repeats)
    windows = (8, 16) if tiny else (32, 128, 512)
    lengths = (64, 128) if tiny else (64, 256, 1024, 4096, 16384)
    width, before = (64, (8, 64)) if tiny else (256, (256, 2304, 16640))  # half a window is open
    counts = (1000, 2000) if tiny else (10_000, 100_000, 1_000_000)
    batches = 1 if tiny else 16
    return {
        "waking": lambda: speed.waking(model, window=16 if tiny else 128, repeats=often),
        "pause": lambda: speed.pauses(model, windows=windows, repeats=often),
        "decoding": lambda: generate.decoding(
            generate.CPU, width, windows[-1], before, tokens=8 if tiny else 32, repeats=often
        ),
        **memory_layers.tables(repeats, tiny),
        "prefill": lambda: generate.sleeping(generate.CPU, width, windows, often),
        "size": lambda: size.measured(SMALL, window=64, lengths=lengths),
        "break-even": size.by_formula,
        "stream": lambda: stream.lengths(SMALL, counts=counts),
        "storage": lambda: memories.stored(batches=batches),
        "merge": lambda: memories.merged(batches=batches),
        "identity": lambda: memories.identified(SMALL if tiny else LARGE, repeats=often),
    }
