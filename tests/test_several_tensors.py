"""A block may keep any number of tensors of any shape: here linear attention with its normaliser."""

import pytest
import torch
from conftest import close, lively, random_tokens, run_command, same_memory, tiny
from safetensors.torch import load_file
from torch import nn

from lmsleep import Cache, HybridLM, Memory, Session, SessionBatch, SleepConfig, State, inspect, sleep_forward
from lmsleep.memory import figures
from lmsleep.memory.saved import pack, unpack

H, K, V = 2, 3, 4
SHAPES = ((H, K, V), (H, K))  # S, and z, what its keys add up to


class Normalised(nn.Module):
    """`o_t = S_t^T q_t / (z_t . q_t)`, token by token; `S_t` adds up `k v^T`, `z_t` adds up `k`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k = (nn.Linear(width, H * K, bias=False) for _ in range(2))
        self.v, self.o = nn.Linear(width, H * V, bias=False), nn.Linear(H * V, width, bias=False)

    def forward(self, h, memory, valid):
        S, z = memory
        q, k = (torch.exp(p(h)).unflatten(-1, (H, K)) for p in (self.q, self.k))
        v, out = self.v(h).unflatten(-1, (H, V)), []
        if valid is not None:  # padding writes nothing
            k = k * valid[..., None, None]
        for t in range(h.shape[1]):
            S, z = S + k[:, t, :, :, None] * v[:, t, :, None], z + k[:, t]
            read = torch.einsum("bhk,bhkv->bhv", q[:, t], S) / (q[:, t] * z).sum(-1, keepdim=True).clamp(
                min=1e-9
            )
            out.append(read.flatten(1))
        return h + self.o(torch.stack(out, 1)) if out else h, (S, z)


class Counting(nn.Module):
    """A backbone of three blocks that keep two tensors, none and one."""

    num_blocks, vocab_size, kinds = 3, 7, ("normalised", "mlp", "counter")
    device = torch.device("cpu")

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.block = nn.Embedding(self.vocab_size, width), Normalised(width)
        self.mlp = nn.Linear(width, width)
        self.double()

    def initial_state(self, batch_size):
        memory = Memory.zeros([SHAPES, None, (1,)], batch_size, dtype=torch.float64)
        return State(memory, Cache(((), (), ())))

    def embed(self, tokens):
        return self.table(tokens)

    def run(self, h, state, start, stop, *, valid=None, span=None):
        for i in range(start, stop):
            layer = state.memory.layers[i]
            if i == 0:
                h, layer = self.block(h, layer, valid)
            elif i == 1:
                h = h + torch.tanh(self.mlp(h))
            else:  # how many tokens wrote, `[B, 1]`
                wrote = torch.ones_like(h[..., 0]) if valid is None else valid.to(h)
                layer = layer + wrote.sum(1, keepdim=True)
            state = state.replace(i, [(layer, ())])
        return h, state

    def head(self, h):
        return h @ self.table.weight.T


SLEEP = SleepConfig(window=4, passes=3)


@pytest.fixture(scope="module")
def model():
    return Counting()


@pytest.fixture(scope="module")
def read(model):
    with torch.no_grad():
        return sleep_forward(model, random_tokens(3, 11, vocab=7), None, SLEEP, evict_last=True).memory


def test_one_form_for_one_thing():
    S, z = torch.ones(2, *SHAPES[0]), torch.ones(2, *SHAPES[1])
    memory = Memory(((S, z), (), (z,), S, None))
    assert memory.layers == ((S, z), None, z, S, None) and memory.parts == ((S, z), (), (z,), (S,), ())
    assert memory.S == (S, None, None, S, None) and memory.writes == (True, False, True, True, False)
    assert len(list(memory.tensors())) == 4 and memory.nbytes == 2 * (S.nbytes + z.nbytes)


def test_zeros_of_several_shapes(model):
    memory = model.initial_state(5).memory
    assert [[tuple(t.shape) for t in part] for part in memory.parts] == [
        [(5, 2, 3, 4), (5, 2, 3)],
        [],
        [(5, 1)],
    ]
    assert memory.batch_size == 5 and not any(bool(t.any()) for t in memory.tensors())


def test_a_sleep_writes_all_of_them(model, read):
    x, state = random_tokens(3, 11, vocab=7), model.initial_state(3)
    for window in x.split(4, dim=1):
        h, begin = model.embed(window), state.cache
        for _ in range(3):
            h, state = model.run(h, State(state.memory, begin), 0, 3)
    assert same_parts(read, state.memory) and bool((read.layers[2] == 33).all())
    assert not same_parts(read, sleep_forward(model, x, None, SLEEP.with_passes(1), evict_last=True).memory)


def same_parts(a: Memory, b: Memory, tolerance: float = 1e-12) -> bool:
    return all(close(s, t, tolerance) for s, t in zip(a.tensors(), b.tensors(), strict=True))


def test_rows_of_different_length_sleep_as_if_alone(model):
    x, lengths = random_tokens(3, 11, vocab=7), torch.tensor([11, 3, 8])
    with torch.no_grad():
        together = sleep_forward(model, x, None, SLEEP, lengths=lengths, evict_last=True).memory
        for row, n in enumerate(lengths.tolist()):
            alone = sleep_forward(model, x[row : row + 1, :n], None, SLEEP, evict_last=True).memory
            assert same_parts(together[[row]], alone)


def test_rows_move_and_join(read):
    parts = State(read, Cache(((), (), ()))).split()
    order = torch.tensor([2, 0, 1])
    assert same_parts(State.join(parts, order).memory, read[order])
    assert same_parts(read.to(dtype=torch.float32).like(read), read, 1e-6)
    parts[0].memory.layers[0][1].zero_()
    assert bool(read.layers[0][1].any())


def test_a_state_of_other_rows_is_refused(model, read):
    with pytest.raises(ValueError, match="rows of tokens"):
        sleep_forward(
            model, random_tokens(2, 4, vocab=7), None, SLEEP, state=State(read, Cache(((), (), ())))
        )


def test_gradients_reach_all_of_them(model):
    begin = model.initial_state(2)
    memory = begin.memory.map(lambda t: (t + 1).requires_grad_())
    x = random_tokens(2, 9, vocab=7)
    out = sleep_forward(
        model, x, torch.ones_like(x, dtype=torch.bool), SLEEP, state=State(memory, begin.cache)
    )
    S, z = memory.layers[0]
    for gradient in torch.autograd.grad(out.loss, (S, z)):
        assert bool(gradient.any())
    assert not any(t.requires_grad for t in out.memory.detach().tensors())


def test_sessions_stream_save_load_and_fork_them(model, tmp_path):
    x, path = random_tokens(23, vocab=7), tmp_path / "a.mem"
    whole, cut = Session(model, SLEEP), Session(model, SLEEP)
    whole.read(x)
    cut.read(x[:14])
    cut.save(path)
    again = Session.load(path, model)
    batch = SessionBatch([again, fork := cut.fork()])
    batch.read([x[14:], x[14:17]])
    fork.read(x[17:])
    for session in (again, fork):
        assert same_parts(session.memory, whole.memory)
        assert session.generate([1], 6) == whole.fork().generate([1], 6)
    assert again.origin.id == cut.origin.id and fork.origin.parents == (cut.origin.id,)
    assert whole.memory.origin.rule == ("normalised", None, "counter")


def test_files_name_the_first_as_ever_and_count_the_others(model, read, tmp_path):
    read.save(tmp_path / "a.mem", model)
    assert load_file(tmp_path / "a.mem").keys() == {"S.0", "S.0.1", "S.2"}
    loaded = Memory.load(tmp_path / "a.mem", model)
    assert same_parts(loaded, read, 0.0) and loaded.layers[1] is None
    child = loaded.fork()
    merged = child.merge([loaded], [0.5, 0.5])
    assert same_parts(merged, read) and merged.origin.parents == (child.origin.id, loaded.origin.id)
    assert max(float(t.abs().max()) for t in merged.diff(read).tensors()) < 1e-9


@pytest.mark.parametrize(("storage", "error"), [("bfloat16", 2**-8), ("int8", 1 / 254)])
def test_they_are_stored_in_fewer_bits(read, storage, error):
    back = Memory(unpack(pack(read, storage), 3))
    for s, t in zip(read.tensors(), back.tensors(), strict=True):
        assert close(t.double(), s, error * 1.01)
    z = pack(read, "int8")["S.0.1.scale"]
    assert z.shape == (3, H, 1) and pack(read, "int8")["S.2.scale"].shape == (3, 1)


@pytest.mark.parametrize("change", [{"S.0.2": torch.ones(3, 1)}, {"S.1": torch.ones(3, 1)}], ids=str)
def test_another_layout_is_refused(model, read, tmp_path, change):
    layers = [list(part) for part in read.parts]
    for name, t in change.items():
        layers[int(name.split(".")[1])].append(t)
    Memory(tuple(map(tuple, layers))).save(tmp_path / "a.mem", model)
    with pytest.raises(ValueError, match="has fast weights"):
        Memory.load(tmp_path / "a.mem", model)


@pytest.mark.parametrize("name", ["S.0.3", "S.9", "S.1.1", "S.x"])
def test_a_tensor_of_no_block_is_refused(read, name):
    with pytest.raises(ValueError, match="of no block"):
        unpack({**pack(read, None), name: torch.ones(3, 1)}, 3)


def test_statistics_are_of_S_and_the_rest_is_named(read, model, tmp_path, capsys):
    S, z = read.layers[0]
    assert close(read.norms(), torch.linalg.matrix_norm(S)[:, None]) and read.effective_rank().shape == (
        3,
        1,
        H,
    )
    assert [row["norm"] for row in figures.head_rows(read)] == pytest.approx(
        torch.linalg.matrix_norm(S).flatten().tolist()
    )
    others = figures.other_rows(read)
    assert [(row["block"], row["tensor"], row["shape"]) for row in others] == [
        (0, 1, [3, H, K]),
        (2, 0, [3, 1]),
    ]
    assert others[0]["norm"] == pytest.approx(float(z.norm()))
    read.save(tmp_path / "a.mem", model)
    read.map(lambda t: 2 * t).save(tmp_path / "b.mem", model)
    code, out, _ = run_command(capsys, "memory", "show", tmp_path / "a.mem")
    assert code == 0 and f"[3, {H}, {K}]" in out and "beside S" in out
    code, out, _ = run_command(capsys, "memory", "diff", tmp_path / "a.mem", tmp_path / "b.mem")
    assert code == 0 and f"{float(z.norm()):.4f}" in out


def test_the_microscope_looks_at_S_beside_other_tensors(model):
    session = Session(model, SLEEP)
    session.read(random_tokens(5, vocab=7))
    seen = inspect(session, random_tokens(9, seed=1, vocab=7).tolist())
    assert {(row["block"], row["head"]) for row in seen.heads} == {(0, 0), (0, 1)} and seen.change


class Two(nn.Module):
    """A block of one's own in a `HybridLM`: called as its blocks are, with two tensors for fast weights."""

    memory_shape = SHAPES

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixer = _NoCache(width)

    def forward(self, h, memory, cache, valid, span, filled):
        h, memory = self.mixer(h, memory, valid)
        return h, memory, cache


class _NoCache(Normalised):
    def empty_cache(self, batch_size):
        return ()


def test_a_block_of_ones_own_in_a_hybrid(tmp_path):
    model = lively(tiny("attention", "gated_linear", "gated_delta_net"))
    torch.manual_seed(1)
    model.blocks[1] = Two(model.config.d_model).double()
    assert isinstance(model, HybridLM)
    session, whole = Session(model, SLEEP), random_tokens(14)
    session.read(whole[:9])
    session.save(tmp_path / "a.mem")
    again = Session.load(tmp_path / "a.mem", model)
    session.read(whole[9:]), again.read(whole[9:])
    assert len(session.memory.parts[1]) == 2 and same_parts(again.memory, session.memory)
    with torch.no_grad():
        out = sleep_forward(model, whole[None], None, SLEEP)
    assert same_parts(session.memory, out.memory, 1e-9)
    assert same_memory(Memory(out.memory.S), Memory(session.memory.S), 1e-9)
