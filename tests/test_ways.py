"""What holds for every way of remembering; a new one is a line in `WAYS`."""

import ctypes
import gc
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import close, lively, random_tokens, same_memory, tiny
from hf_models import family
from sequences import LENGTHS, TOKENS, goes_on, reads_together, rows_do_not_meet

from lmsleep import (
    Compact,
    Eviction,
    GradientSteps,
    GradMem,
    HybridConfig,
    InPlace,
    MemoryTokens,
    Passes,
    Session,
    SleepConfig,
    adapt,
    sleep_forward,
)
from lmsleep.sleep import Consolidator


@dataclass(frozen=True)
class Way:
    model: HybridConfig | str  # or a family of transformers
    by: Consolidator
    eviction: Eviction | str = "hard"
    near: float = 1e-12  # how far rounding may lead

    def sleep(self, window: int = 4) -> SleepConfig:
        return SleepConfig(window=window, consolidator=self.by, eviction=self.eviction)


ATTENTION, HYBRID = ("attention", "attention"), tiny("attention", "gated_delta_net")
PLAIN = tiny(*ATTENTION, num_kv_heads=1)
TRAINED = tiny(*ATTENTION, overrides={1: {"trained_mlp": True}})
VECTORS = tiny(*ATTENTION, memory_tokens=3)
LEARNING = tiny("attention", "gated_delta_net", "attention", overrides={2: {"in_place_mlp": True}})
WAYS = {
    "passes": Way(HYBRID, Passes(4)),
    "passes, sliding": Way(HYBRID, Passes(4), "sliding"),
    "gradient steps": Way(TRAINED, GradientSteps(3, rate=0.3)),
    "memory tokens": Way(VECTORS, MemoryTokens(2)),
    "memory tokens twice": Way(VECTORS, MemoryTokens(3)),
    "gradmem": Way(VECTORS, GradMem(3, rate=0.4)),
    "in place": Way(LEARNING, InPlace(2, rate=0.2)),
    "in place by chunks": Way(LEARNING, InPlace(2, rate=0.2, chunk=3)),
    "in place by chunks, sliding": Way(LEARNING, InPlace(2, rate=0.2, chunk=3), "sliding"),
    "in place twice": Way(LEARNING, InPlace(3, rate=0.1), "sliding"),
    "compact": Way(PLAIN, Passes(1), Compact(keys=3, reach=9), 1e-9),
    "compact, most attended": Way(PLAIN, Passes(1), Compact(keys=3, method="attended"), 1e-9),
    "compact, smallest": Way(PLAIN, Passes(1), Compact(keys=3, method="norm"), 1e-9),
    "compact, any": Way(PLAIN, Passes(1), Compact(keys=3, method="random"), 1e-9),
    "passes, compact": Way(HYBRID, Passes(4), Compact(keys=3), 1e-9),
    "llama, compact": Way("llama", Passes(1), Compact(keys=3), 1e-4),
    "llama, sliding": Way("llama", Passes(1), "sliding", 1e-4),
}
EACH = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


def made(model: HybridConfig | str, dtype: torch.dtype = torch.float64):
    if isinstance(model, str):
        return adapt(family(model), attention_alone=True)
    return lively(model, dtype=dtype)


@EACH
def test_rows_do_not_influence_each_other(way):
    rows_do_not_meet(made(way.model), way.sleep(), way.near)


@EACH
def test_a_session_reads_in_any_pieces_and_goes_on_from_its_file(way, tmp_path):
    goes_on(made(way.model), way.sleep(), tmp_path / "a.mem", way.near)


@EACH
def test_sessions_that_stand_at_different_places_read_together(way):
    reads_together(made(way.model), way.sleep(), way.near)


@EACH
def test_a_loss_that_is_heard_alone_is_that_of_all_logits(way):
    mask = torch.rand(3, 14, generator=torch.Generator().manual_seed(0)) < 0.4
    for lengths in (None, LENGTHS):
        losses = [
            sleep_forward(
                made(way.model), TOKENS, mask, way.sleep(), lengths=lengths, return_logits=all_logits
            ).loss
            for all_logits in (True, False)
        ]
        assert close(*losses, way.near)


@EACH
def test_evaluation_writes_the_same_and_leaves_no_graph(way):
    model = made(way.model)
    training = sleep_forward(model, TOKENS, None, way.sleep())
    with torch.no_grad():
        reading = sleep_forward(model, TOKENS, None, way.sleep())
    assert close(training.logits, reading.logits, way.near)
    assert same_memory(training.memory, reading.memory, way.near)
    assert training.logits.requires_grad and not any(t.requires_grad for t in reading.state.tensors())
    assert all(p.grad is None for p in model.parameters())


def taken():
    # How many tensors the process knows, and how many bytes it holds, all given back that can be.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS")]
    tensors = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
    return tensors, 1024 * int(line.split()[1])


def streamed(way, tokens, window):
    # Yields what a session counts after each of ten pieces, all of whole windows.
    session = Session(made(way.model, torch.float32), way.sleep(window))
    for piece in random_tokens(tokens).split(tokens // 10):
        session.read(piece)
        session.sleep()
        stats = session.stats
        yield stats.memory_bytes, stats.working_bytes, stats.history_bytes, stats.peak_bytes
    assert all(bool(t.isfinite().all()) for t in session.stream.state.tensors())
    assert bool(session.logits(random_tokens(9)).isfinite().all())
    assert len(session.generate(random_tokens(3), 3)) == 3


@EACH
def test_a_session_holds_no_more_than_after_its_first_windows(way):
    _, *sizes = streamed(way, 240, 12)
    assert len({*sizes}) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", [name for name in WAYS if "twice" not in name and "chunks" not in name])
def test_a_process_that_reads_a_hundred_thousand_tokens_takes_no_more_than_after_the_first_ten(name):
    # One tensor a window would be 1,400 tensors more; of one that autograd alone knows, of 64 x 16 numbers,
    # 5 MiB.
    counts, held = zip(*(taken() for _ in streamed(WAYS[name], 102_400, 64)), strict=True)
    assert len({*counts[1:]}) == 1, counts
    assert max(held[1:]) - held[1] < 1 << 20, held
