import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import close, lively, random_tokens, relative_error, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lmsleep import ops
from lmsleep.ops import RULES, Rule, register_rule
from lmsleep.ops.rules.head_decay import chunks

RULE_NAMES = sorted(RULES)
GATES = ("none", "near zero", "mild", "strong", "mixed")
WRITES = ("none", "sigmoid", "full", "reflecting")
KEYS = ("random", "correlated")

# Relative RMS, about ten times the worst measured over all cases below. With beta = 2, no forgetting and
# keys that are nearly alike, a chunk adds up large terms that cancel, which costs float32 two digits.
FLOAT64 = {"forward": 5e-12, "gradient": 5e-12}
FLOAT32 = {"forward": 1e-5, "gradient": 1e-4}
FLOAT32_REFLECTING = {"forward": 1e-3, "gradient": 1e-3}
BFLOAT16 = {"forward": 2e-2, "gradient": 2e-2}
FLA = {"forward": 1e-2, "gradient": 2e-2}  # its kernels multiply in TF32 at best


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    initial_state: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(*(x.to(dtype) for x in self))


def inputs(
    rule="gated_delta_rule", B=2, T=130, H=2, K=7, V=6, *,
    gates="mixed", writes="sigmoid", keys="random", seed=0,
) -> Inputs:  # fmt: skip
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    k = randn(B, T, H, K) if keys == "random" else randn(B, 1, H, K) + 0.1 * randn(B, T, H, K)
    sizes = RULES[rule].sizes(K, V)
    uniform = torch.rand(B, T, H, *sizes.g, generator=rng, dtype=torch.float64)
    decay = {
        "none": torch.zeros_like(uniform),
        "near zero": 1e-6 * uniform,
        "mild": (randn(B, T, H, *sizes.g) - 2).exp(),
        "strong": 60 * uniform,
    }
    decay["mixed"] = torch.where(uniform < 0.1, 60.0, torch.where(uniform < 0.3, 0.0, decay["mild"]))
    sigmoid = randn(B, T, H, *sizes.beta).sigmoid()
    write = {
        "none": torch.zeros_like(sigmoid),
        "sigmoid": sigmoid,
        "full": torch.ones_like(sigmoid),
        "reflecting": torch.full_like(sigmoid, 2.0),
    }
    return Inputs(
        F.normalize(randn(B, T, H, K), dim=-1), F.normalize(k, dim=-1), randn(B, T, H, V),
        -decay[gates], write[writes], randn(B, H, *sizes.state),
    )  # fmt: skip


def shapes() -> st.SearchStrategy[Callable[[str], Inputs]]:
    # What gives the inputs of a rule.
    lengths = st.one_of(st.sampled_from([0, 1, 2, 31, 32, 33, 64, 65]), st.integers(0, 200))
    return st.builds(
        lambda *sizes, **options: lambda rule: inputs(rule, *sizes, **options),
        st.integers(1, 3), lengths, st.integers(1, 3), st.integers(1, 9), st.integers(1, 9),
        gates=st.sampled_from(GATES), writes=st.sampled_from(WRITES), keys=st.sampled_from(KEYS),
        seed=st.integers(0, 2**32),
    )  # fmt: skip


def run(rule: str, backend: str, x: Inputs, unread: str = "", autocast: bool = False) -> dict[str, Tensor]:
    # Output, final state, and the gradient of a random linear function of both (but of what is unread).
    leaves = Inputs(*(y.detach().clone().requires_grad_() for y in x))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        o, state = ops.update(rule, *leaves[:5], initial_state=leaves.initial_state, backend=backend)
    rng = torch.Generator().manual_seed(1)
    score = sum(
        (y.cpu().double() * torch.randn(y.shape, generator=rng, dtype=torch.float64)).sum()
        for name, y in (("o", o), ("state", state))
        if name != unread
    )
    # Autograd's own backward follows autocast where it is called; one that is written out must not.
    written_out = backend == "chunked" and rule in ("gated_delta_rule", "gated_linear_rule")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and written_out):
        score.backward()
    # A sequence of no tokens has no path from its (empty) inputs.
    gradients = {
        f"d{name}": torch.zeros_like(y) if y.grad is None else y.grad for name, y in leaves._asdict().items()
    }
    return {"o": o.detach(), "state": state.detach(), **gradients}


def tolerance(x: Inputs) -> dict[str, float]:
    if x.q.dtype == torch.float64:
        return FLOAT64
    return FLOAT32_REFLECTING if (x.beta > 1).any() else FLOAT32


def assert_agree(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    limits: dict[str, float],
    rounded: dict[str, Tensor] | None = None,
) -> None:
    # With the definition's own results in the dtype of what is tested (`rounded`), nobody is asked for more
    # digits than the definition keeps there: an error is within a limit, or within twice its error.
    # A gate that forgets all has a gradient of e^-60 in exact arithmetic and rounding noise in ours:
    # no gradient is held to more than a hundredth of the size of all of them.
    gradients = [y for name, y in expected.items() if name.startswith("d")]
    floor = 0.01 * torch.stack([y.double().norm() for y in gradients]).norm().item()
    for name, wanted in expected.items():
        kind = "gradient" if name.startswith("d") else "forward"
        got = actual[name].cpu()
        assert got.isfinite().all(), name
        # A state that forgot all is compared as zero: float32 cannot hold e^-120.
        least = floor if kind == "gradient" else 1e-20
        error, limit = relative_error(got, wanted, least), limits[kind]
        if rounded is not None:
            limit = max(limit, 2 * relative_error(rounded[name], wanted, least))
        assert error <= limit, f"{name}: {error:.1e} > {limit:.1e}"


def slots_by_hand(q, k, v, g, beta, S):
    # Slot by slot, of one head: what it holds, and how much of it is read.
    keys, values, outputs = [*S[:, : k.shape[1]]], [*S[:, k.shape[1] :]], []
    for t in range(len(q)):
        for m in range(len(S)):
            keys[m] = g[t, m].exp() * keys[m] + beta[t, m] * k[t]
            values[m] = g[t, m].exp() * values[m] + beta[t, m] * v[t]
        weights = [(q.shape[1] * key.dot(q[t])).exp() for key in keys]
        outputs.append(sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights))
    return torch.stack(outputs), torch.stack([torch.cat(slot) for slot in zip(keys, values, strict=True)])


def brute_force(rule: str, x: Inputs) -> tuple[Tensor, Tensor]:
    # The update as matrices, in the paper's orientation (S is [V, K]), one head at a time.
    B, T, H, K = x.k.shape
    o, final = torch.zeros_like(x.v), torch.zeros_like(x.initial_state)
    for b in range(B):
        for h in range(H):
            if rule == "raven":
                o[b, :, h], final[b, h] = slots_by_hand(*(y[b, :, h] for y in x[:5]), x.initial_state[b, h])
                continue
            S = x.initial_state[b, h].T
            for t in range(T):
                q, k, v = x.q[b, t, h], x.k[b, t, h], x.v[b, t, h]
                alpha, beta = x.g[b, t, h].exp(), x.beta[b, t, h]
                erase = torch.eye(K, dtype=k.dtype)
                if rule != "gated_linear_rule":
                    erase = erase - beta * torch.outer(k, k)
                S = S @ (alpha * torch.eye(K, dtype=k.dtype)) @ erase + beta * torch.outer(v, k)
                o[b, t, h] = S @ q / K**0.5
            final[b, h] = S.T
    return o, final


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("writes", WRITES)
def test_reference_is_the_matrix_form(rule, writes):
    x = inputs(rule, T=40, writes=writes, gates="mild")
    o, state = brute_force(rule, x)
    got = run(rule, "reference", x)
    assert relative_error(got["o"], o) <= 1e-14
    assert relative_error(got["state"], state) <= 1e-14


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_reference_gradient_is_the_derivative(rule):
    x = tuple(y.requires_grad_() for y in inputs(rule, 1, 5, 2, 3, 2, gates="mild"))
    assert torch.autograd.gradcheck(lambda *y: RULES[rule].reference(*y[:5], 0.7, y[5]), x)


@pytest.mark.parametrize("rule", RULE_NAMES)
@given(x=shapes())
def test_chunked_agrees_in_float64(rule, x):
    x = x(rule)
    assert_agree(run(rule, "chunked", x), run(rule, "reference", x), tolerance(x))


def pairwise(*options):
    # Few rows in which every two values of different options meet: each takes most of what has not met yet.
    rows = []
    left = {
        ((i, a), (j, b))
        for (i, one), (j, other) in itertools.combinations(enumerate(options), 2)
        for a, b in itertools.product(one, other)
    }
    every = list(itertools.product(*options))
    pairs = {row: set(itertools.combinations(enumerate(row), 2)) for row in every}
    while left:
        rows.append(max(every, key=lambda row: len(pairs[row] & left)))
        left -= pairs[rows[-1]]
    return rows


@pytest.mark.parametrize(
    ("rule", "gates", "writes", "keys", "dtype"),
    pairwise(RULE_NAMES, GATES, WRITES, KEYS, [torch.float64, torch.float32]),
)
def test_chunked_agrees_at_the_extremes(rule, gates, writes, keys, dtype):
    x = inputs(rule, gates=gates, writes=writes, keys=keys).to(dtype)
    assert_agree(run(rule, "chunked", x), run(rule, "reference", x.to(torch.float64)), tolerance(x))


@pytest.mark.parametrize("rule", RULE_NAMES)
@given(x=shapes())
def test_chunked_agrees_in_float32(rule, x):
    x = x(rule)
    x = x.to(torch.float32)
    assert_agree(run(rule, "chunked", x), run(rule, "reference", x.to(torch.float64)), tolerance(x))


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize(
    "size",
    [
        {"B": 200, "T": 24, "K": 16, "V": 16},
        {"B": 1, "T": 75, "K": 128, "V": 128},
        {"B": 2, "T": 97, "K": 96, "V": 160},  # chunks of more than 64 tokens, the last one padded
        {"B": 1, "T": 700, "H": 1, "gates": "none", "writes": "full"},
        {"B": 1, "T": 700, "H": 1, "gates": "near zero", "keys": "correlated"},
        {"B": 1, "T": 700, "H": 1, "gates": "strong"},
    ],
    ids=str,
)
def test_chunked_agrees_in_float32_on_large_batches_states_and_long_products(rule, size):
    # Raven is the one whose definition loses digits here: 700 keys nearly alike that never fade make scores
    # of some hundreds, whose rounding its softmax turns into errors of 1.5e-5, on some processors.
    x = inputs(rule, **size).to(torch.float32)
    exact, rounded = run(rule, "reference", x.to(torch.float64)), run(rule, "reference", x)
    assert_agree(run(rule, "chunked", x), exact, tolerance(x), rounded)


@pytest.mark.parametrize("T", [1, 24, 75, 512, 2000])
@pytest.mark.parametrize("size", [8, 32, 64, 128])
def test_chunks_are_of_equal_length_and_hardly_padded(T, size):
    n, C = chunks(T, size, size)
    assert 0 <= n * C - T < n and max(32, size) >= C


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("unread", ["o", "state"])
def test_chunked_gradients_agree_where_a_result_is_not_used(rule, unread):
    x = inputs(rule)
    assert_agree(run(rule, "chunked", x, unread), run(rule, "reference", x, unread), FLOAT64)


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("name", Inputs._fields)
def test_chunked_gradient_of_one_input_alone(rule, name):
    x = inputs(rule, T=70)
    expected = run(rule, "chunked", x)[f"d{name}"]
    leaf = getattr(x, name).requires_grad_()
    o, state = ops.update(rule, **x._asdict(), backend="chunked")
    rng = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=rng, dtype=torch.float64) for y in (o, state)]
    # The queries do not reach the state; autograd says so where it was left to it.
    reached = [(y, weight) for y, weight in zip((o, state), weights, strict=True) if y.requires_grad]
    (gradient,) = torch.autograd.grad([y for y, _ in reached], leaf, [weight for _, weight in reached])
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_autocast_does_not_lower_the_precision_of_the_state(rule, backend):
    x = inputs(rule).to(torch.float32)
    got = run(rule, backend, x, autocast=True)
    assert all(torch.equal(got[name], y) for name, y in run(rule, backend, x).items())


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("rule", RULE_NAMES)
def test_low_precision_inputs_keep_a_float32_state(rule, backend):
    x = inputs(rule, K=16, V=16)
    x = x._replace(**{name: getattr(x, name).bfloat16() for name in "qkv"})
    x = x._replace(**{name: getattr(x, name).float() for name in ("g", "beta", "initial_state")})
    got = run(rule, backend, x)
    assert got["o"].dtype == torch.bfloat16
    assert got["state"].dtype == torch.float32
    assert_agree(got, run(rule, "reference", x.to(torch.float64)), BFLOAT16)


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_one_float64_input_makes_the_state_float64(rule):
    x = inputs(rule, T=3).to(torch.float32)
    x = x._replace(initial_state=x.initial_state.double())
    o, state = ops.update(rule, *x[:5], initial_state=x.initial_state)
    assert (o.dtype, state.dtype) == (torch.float32, torch.float64)


def test_kernels_get_q_k_and_v_in_one_dtype(monkeypatch):
    def kernel(q, k, v, g, beta, scale, state):
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        return v, state

    monkeypatch.setattr("lmsleep.ops.rules._choose", lambda *_: (kernel, False))
    q, k, v = (torch.randn(1, 2, 1, 4) for _ in "qkv")
    g = beta = torch.zeros(1, 2, 1)
    assert ops.gated_delta_rule(q, k, v.bfloat16(), g, beta)[0].dtype == torch.bfloat16  # as under autocast


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("T", [1, 63, 64, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_fla_agrees(rule, T, dtype):
    pytest.importorskip("fla")
    x = inputs(rule, B=2, T=T, H=2, K=64, V=64, gates="mild").to(torch.float32)
    x = x._replace(**{name: getattr(x, name).to(dtype) for name in "qkv"})
    got = run(rule, "fla", Inputs(*(y.cuda() for y in x)))
    assert got["state"].dtype == torch.float32
    assert_agree(got, run(rule, "reference", x.to(torch.float64)), FLA)


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_token_may_forget_everything(rule, dtype):
    # At the beginning, alone, twice in a row and at the end; for all channels or for some.
    x = inputs(rule, T=70, gates="mild").to(dtype)
    for t in (0, 7, 8, 33, 69):
        x.g[:, t] = float("-inf")
    x.g[:, 50, ..., ::2] = float("-inf")  # heads, or channels
    reference = run(rule, "reference", x.to(torch.float64))
    assert_agree(run(rule, "chunked", x), reference, tolerance(x))
    o, state = brute_force(rule, x.to(torch.float64))
    assert close(reference["o"], o) and close(reference["state"], state)
    assert not reference["dinitial_state"].any() and not reference["dg"][:, 7].any()


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("empty", [{"B": 0}, {"T": 0}])
def test_no_rows_and_no_tokens_are_read(rule, backend, empty):
    x = inputs(rule, **{"B": 2, "T": 5, **empty})
    o, state = ops.update(rule, **x._asdict(), backend=backend)
    assert o.shape == x.v.shape and torch.equal(state, x.initial_state)


@pytest.mark.parametrize("rule", ["kda", "raven"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_channel_may_forget_all_at_once_beside_one_that_never_does(rule, backend):
    # e^{-sum g} of a chunk, which the textbook's form needs, would be e^{64000}.
    x = inputs(rule, K=16, V=16, gates="none").to(torch.float32)
    x.g[..., ::2] = -2000.0
    got = run(rule, backend, x)
    assert_agree(got, run(rule, "reference", x.to(torch.float64)), FLOAT32)
    assert got["state"][:, :, 1::2].norm() > 0


def test_slots_that_are_written_once_are_attention_over_all_tokens():
    # Slot t gets token t; slots that are empty have a key and a value of zero.
    T, H, K = 7, 2, 32
    x = inputs("raven", 2, T, H, K, K)
    slots = torch.eye(x.beta.shape[-1], dtype=x.q.dtype)[:T, None].expand_as(x.beta)
    k, v = (F.pad(y, (0, 0, 0, 0, 0, slots.shape[-1] - T)) for y in (x.k, x.v))
    written = torch.arange(slots.shape[-1]) <= torch.arange(T)[:, None]
    for backend in ("reference", "chunked"):
        o, _ = ops.update("raven", x.q, x.k, x.v, torch.zeros_like(x.g), slots, backend=backend)
        for t in range(T):
            q, *seen = (
                y.transpose(1, 2)
                for y in (x.q[:, t : t + 1], *(y * written[t, :, None, None] for y in (k, v)))
            )
            expected = F.scaled_dot_product_attention(q, *seen, scale=K)
            assert close(o[:, t], expected[:, :, 0])


@pytest.mark.parametrize("name", ["chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"])
@pytest.mark.parametrize("gates", ["mild", "mixed"])
def test_kda_agrees_with_transformers(name, gates):
    kimi = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    theirs = getattr(kimi, name)
    x = inputs("kda", T=130, K=8, V=6, gates=gates).to(torch.float32)
    o, state = getattr(theirs, "__wrapped__", theirs)(
        *x[:5], initial_state=x.initial_state, output_final_state=True
    )
    for backend in ("reference", "chunked"):
        got = run("kda", backend, x)
        assert relative_error(got["o"], o) <= 2e-5  # theirs takes differences of sums, which cancel
        assert relative_error(got["state"], state) <= 2e-5


@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
@pytest.mark.parametrize("writes", ["sigmoid", "full"])
def test_agrees_with_transformers(name, writes):
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    theirs = getattr(qwen, name)
    x = inputs(T=130, K=8, V=6, gates="mild", writes=writes).to(torch.float32)
    o, state = getattr(theirs, "__wrapped__", theirs)(
        *x[:5], initial_state=x.initial_state, output_final_state=True
    )
    for backend in ("reference", "chunked"):
        got = run("gated_delta_rule", backend, x)
        assert relative_error(got["o"], o) <= 5e-6
        assert relative_error(got["state"], state) <= 5e-6


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@given(x=shapes(), data=st.data())
def test_a_sequence_may_be_cut_anywhere(rule, backend, x, data):
    x = x(rule)
    T = x.q.shape[1]
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=3), label="cuts"))
    op, state, outputs = partial(ops.update, rule), x.initial_state, []
    for a, b in zip([0, *cuts], [*cuts, T], strict=True):
        o, state = op(*(y[:, a:b] for y in x[:5]), initial_state=state, backend=backend)
        outputs.append(o)
    whole, final = op(*x[:5], initial_state=x.initial_state, backend=backend)
    assert close(torch.cat(outputs, dim=1), whole)
    assert close(state, final)


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_tokens_that_neither_forget_nor_write_leave_the_state_bit_identical(rule, backend, dtype):
    x = inputs(rule, gates="none", writes="none").to(dtype)
    _, state = ops.update(rule, *x[:5], initial_state=x.initial_state, backend=backend)
    assert torch.equal(state, x.initial_state)


@pytest.mark.parametrize("rule", RULE_NAMES)
@given(x=shapes())
def test_tokens_that_neither_forget_nor_write_change_nothing_for_the_others(rule, x):
    x = x(rule)
    op, idle = partial(ops.update, rule), torch.arange(x.q.shape[1]) % 3 == 1
    g, beta = (y.masked_fill(idle.view(-1, *[1] * (y.ndim - 2)), 0.0) for y in (x.g, x.beta))
    o, state = op(x.q, x.k, x.v, g, beta, initial_state=x.initial_state)
    o_busy, state_busy = op(*(y[:, ~idle] for y in (x.q, x.k, x.v, g, beta)), initial_state=x.initial_state)
    assert close(o[:, ~idle], o_busy)
    assert close(state, state_busy)


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_defaults_are_zero_state_key_scale_and_chunked_on_cpu(rule):
    x, op = inputs(rule), partial(ops.update, rule)
    plain = op(*x[:5])
    scale = 7.0 if rule == "raven" else 7**-0.5
    spelled = op(*x[:5], scale=scale, initial_state=torch.zeros_like(x.initial_state), backend="chunked")
    assert torch.equal(plain[0], spelled[0])
    assert torch.equal(plain[1], spelled[1])
    doubled = op(*x[:5], scale=2 * scale)
    assert torch.equal(doubled[1], plain[1])
    if rule != "raven":  # whose scale sharpens what is read
        assert close(doubled[0], 2 * plain[0])


BAD_SHAPES = [
    ("q", lambda x: {"q": x.q[0]}),
    ("k", lambda x: {"k": x.k[:, 1:]}),
    ("v", lambda x: {"v": x.v[:, :, :1]}),
    ("g", lambda x: {"g": x.g[..., None]}),
    ("beta", lambda x: {"beta": x.beta[:1]}),
    ("initial_state", lambda x: {"initial_state": x.initial_state.mT}),
    ("backend", lambda x: {"backend": "triton"}),
    ("backend", lambda x: {"backend": "fla"}),  # the tensors are on the CPU
]


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize(("name", "change"), BAD_SHAPES)
def test_bad_arguments_are_named(rule, name, change):
    x = inputs(rule, T=4)
    arguments = {**x._asdict(), **change(x)}
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        ops.update(rule, **arguments)


@given(
    B=st.integers(1, 3), T=st.integers(1, 12), C=st.integers(1, 5), W=st.integers(1, 5),
    tail=st.integers(0, 4), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_short_conv_is_conv1d_with_zeros_on_the_left(B, T, C, W, tail, seed):
    rng = torch.Generator().manual_seed(seed)
    tail = min(tail, W - 1)
    seen = torch.randn(B, tail + T, C, generator=rng, dtype=torch.float64)
    weight = torch.randn(C, W, generator=rng, dtype=torch.float64)
    y, new_tail = ops.short_conv(seen[:, tail:], weight, seen[:, :tail])
    expected = F.conv1d(F.pad(seen.mT, (W - 1, 0)), weight[:, None], groups=C).mT[:, tail:]
    assert close(y, expected, 1e-14)
    assert torch.equal(new_tail, seen[:, max(tail + T - W + 1, 0) :])


@given(T=st.integers(0, 9), W=st.integers(1, 5), tail=st.integers(0, 4), seed=st.integers(0, 2**32))
def test_short_conv_gradient_is_the_derivative(T, W, tail, seed):
    rng = torch.Generator().manual_seed(seed)
    shapes = [(2, T, 3), (3, W), (2, min(tail, W - 1), 3)]
    leaves = [torch.randn(s, generator=rng, dtype=torch.float64).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(ops.short_conv, leaves)


@given(W=st.integers(1, 5), T=st.integers(0, 12), data=st.data(), seed=st.integers(0, 2**32))
def test_short_conv_may_be_cut_anywhere(W, T, data, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2, T, 3, generator=rng, dtype=torch.float64)
    weight = torch.randn(3, W, generator=rng, dtype=torch.float64)
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=4), label="cuts"))
    tail, outputs = x[:, :0], []
    for a, b in zip([0, *cuts], [*cuts, T], strict=True):
        y, tail = ops.short_conv(x[:, a:b], weight, tail)
        outputs.append(y)
    whole, final = ops.short_conv(x, weight, x[:, :0])
    assert torch.equal(torch.cat(outputs, dim=1), whole)
    assert torch.equal(tail, final)


def dynamic_conv_by_token(x, kernels, tail):
    B, T, C, W = kernels.shape
    seen = torch.cat([x.new_zeros(B, W - 1, C), tail, x], dim=1)
    first = seen.shape[1] - T - (W - 1)
    outputs = [
        torch.einsum("bwc,bcw->bc", seen[:, first + t : first + t + W], kernels[:, t]) for t in range(T)
    ]
    return torch.stack(outputs, dim=1) if outputs else x


@given(
    B=st.integers(1, 3), T=st.integers(0, 9), C=st.integers(1, 4), W=st.integers(1, 5),
    tail=st.integers(0, 6), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_dynamic_conv_is_its_definition(B, T, C, W, tail, seed):
    rng = torch.Generator().manual_seed(seed)
    seen = torch.randn(B, tail + T, C, generator=rng, dtype=torch.float64)
    kernels = torch.randn(B, T, C, W, generator=rng, dtype=torch.float64)
    y, new_tail = ops.dynamic_conv(seen[:, tail:], kernels, seen[:, :tail])
    assert close(y, dynamic_conv_by_token(seen[:, tail:], kernels, seen[:, :tail]), 1e-14)
    assert torch.equal(new_tail, seen[:, max(tail + T - W + 1, 0) :])


@given(T=st.integers(1, 9), W=st.integers(1, 5), data=st.data(), seed=st.integers(0, 2**32))
def test_dynamic_conv_may_be_cut_anywhere_and_holds_short_conv(T, W, data, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2, T, 3, generator=rng, dtype=torch.float64)
    kernels = torch.randn(2, T, 3, W, generator=rng, dtype=torch.float64)
    cuts = sorted(data.draw(st.lists(st.integers(0, T), max_size=4), label="cuts"))
    tail, outputs = x[:, :0], []
    for a, b in zip([0, *cuts], [*cuts, T], strict=True):
        y, tail = ops.dynamic_conv(x[:, a:b], kernels[:, a:b], tail)
        outputs.append(y)
    whole, final = ops.dynamic_conv(x, kernels, x[:, :0])
    assert torch.equal(torch.cat(outputs, dim=1), whole) and torch.equal(tail, final)
    same = kernels[:1, :1].expand_as(kernels)
    assert close(ops.dynamic_conv(x, same, x[:, :0])[0], ops.short_conv(x, kernels[0, 0], x[:, :0])[0], 1e-14)


def test_dynamic_conv_has_the_derivative_of_its_definition_and_names_shapes():
    rng = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 3), (2, 3, 3, 4), (2, 1, 3)]
    leaves = [torch.randn(s, generator=rng, dtype=torch.float64).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(ops.dynamic_conv, leaves)
    with pytest.raises(ValueError, match=r"kernels must be \[B, T, C, W\].*\(2, 2, 3, 4\)"):
        ops.dynamic_conv(leaves[0], leaves[1][:, :2], leaves[2])


# A rule of one's own


def hebbian(q, k, v, g, beta, scale, state):
    del g  # forgets nothing
    outputs = []
    for t in range(q.shape[1]):
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * v[:, t])
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, scale * q[:, t]))
    return torch.stack(outputs, dim=1), state


@pytest.fixture
def own_rule():
    register_rule("hebbian", Rule(hebbian))
    yield "hebbian"
    del RULES["hebbian"]


def test_a_registered_rule_is_used_by_name(own_rule):
    x = inputs(T=5)._replace(g=torch.zeros(2, 5, 2, dtype=torch.float64))
    arguments = {"initial_state": x.initial_state}
    expected = ops.gated_linear_rule(*x[:5], **arguments)
    for actual, wanted in zip(ops.update(own_rule, *x[:5], **arguments), expected, strict=True):
        assert close(actual, wanted)


def test_a_registered_rule_is_a_kind_of_block(own_rule):
    model = lively(tiny("attention", own_rule))
    model(random_tokens(2, 6)).sum().backward()
    assert model.blocks[1].mixer.k_proj.weight.grad.norm() > 0
    linear = lively(tiny("attention", "gated_linear"))
    assert not close(model(random_tokens(2, 6)), linear(random_tokens(2, 6)))  # this one forgets


def test_what_a_rule_lacks_is_named(own_rule):
    x = inputs(T=3)
    with pytest.raises(ValueError, match="hebbian has no such form"):
        ops.update(own_rule, *x[:5], backend="chunked")
    with pytest.raises(ValueError, match="already an update rule named 'hebbian'"):
        register_rule(own_rule, Rule(hebbian))
    with pytest.raises(ValueError, match="unknown rule 'oja'"):
        ops.update("oja", *x[:5])
    with pytest.raises(ValueError, match="blocks: 'oja' is unknown"):
        tiny("oja")
