import itertools

import numpy as np
import pytest
import torch
from conftest import close
from hypothesis import given
from hypothesis import strategies as st

from lmsleep.ops import matching
from lmsleep.ops.matching import METHODS, PULL, few, fitted, mass, non_negative
from lmsleep.state import ABSENT


def problem(T=7, n=12, K=4, V=3, seed=0, sharp=1.5):
    draw = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, m, d, generator=draw).double() for m, d in ((n, K), (T, K), (T, V)))
    return q * sharp, k, v, torch.randn(2, T, generator=draw).double()


def attention(q, k, v, bias):
    return (q @ k.mT + bias[..., None, :]).softmax(-1) @ v


def answers(q, k, found):
    chosen = torch.stack([row[index] for row, index in zip(k, found.chosen, strict=True)])
    return attention(q, chosen, found.values, found.bias)


def best_of_all_supports(gram, target):
    # The minimum under w >= 0 is that of the free w on some support: tried one by one.
    t, best = len(target), (0.0, np.zeros(len(target)))
    for size in range(1, t + 1):
        for support in map(list, itertools.combinations(range(t), size)):
            w = np.zeros(t)
            w[support] = np.linalg.lstsq(gram[np.ix_(support, support)], target[support], rcond=None)[0]
            if (w >= 0).all():
                best = min(best, (w @ gram @ w - 2 * target @ w, w), key=lambda x: x[0])
    return best[1]


@given(st.integers(1, 6), st.integers(0, 10**6))
def test_non_negative_least_squares_find_the_best_of_all_supports(t, seed):
    draw = np.random.default_rng(seed)
    A = draw.normal(size=(3, t + 3, t)) ** 3
    gram, target = A.transpose(0, 2, 1) @ A + 1e-3 * np.eye(t), draw.normal(size=(3, t))
    found = non_negative(torch.from_numpy(gram), torch.from_numpy(target)).numpy()
    for w, G, b in zip(found, gram, target, strict=True):
        assert np.allclose(w, best_of_all_supports(G, b), rtol=1e-6, atol=1e-9)


def test_non_negative_least_squares_go_on_where_exchanges_make_it_worse(monkeypatch):
    # Many problems at once, nearly singular: some need single exchanges, and none may stop the others.
    draw = np.random.default_rng(0)
    A = draw.normal(size=(200, 6, 5)) ** 5
    gram, target = A.transpose(0, 2, 1) @ A + 1e-6 * np.eye(5), draw.normal(size=(200, 5)) ** 3
    w = non_negative(torch.from_numpy(gram), torch.from_numpy(target))
    slope = (torch.from_numpy(gram) @ w[..., None])[..., 0] - torch.from_numpy(target)
    scale = torch.from_numpy(abs(target)).amax(dim=1, keepdim=True)
    # The conditions that the minimum of a convex problem has, and nothing else.
    assert bool((w >= 0).all()) and bool((slope >= -1e-6 * scale).all())
    assert bool(((w * slope).abs() <= 1e-6 * scale * w.clamp(min=1)).all())
    monkeypatch.setattr(matching, "MAX_EXCHANGES", 1)
    assert bool((non_negative(torch.from_numpy(gram), torch.from_numpy(target)) >= 0).all())


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6))
def test_fits_are_those_of_a_direct_solver(n, t, V, seed):
    # Fewer queries than keys included: the pull decides what the queries leave open.
    draw = np.random.default_rng(seed)
    shares = draw.dirichlet(np.full(t + 2, 0.5), size=n)[:, :t]
    outputs, values = draw.normal(size=(n, V)), draw.normal(size=(t, V))
    root = np.sqrt(PULL * (shares**2).sum(axis=0).mean())
    rows = np.concatenate([shares, root * np.eye(t)])
    solved = np.linalg.lstsq(rows, np.concatenate([outputs, root * values]), rcond=None)[0]
    found = fitted(*map(torch.from_numpy, (shares, outputs, values)))
    assert np.allclose(found.numpy(), solved, rtol=1e-6, atol=1e-8)
    target = rows.T @ np.concatenate([np.ones(n), np.full(t, root)])
    expected = best_of_all_supports(rows.T @ rows, target)
    assert np.allclose(mass(torch.from_numpy(shares)).numpy(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("t", [7, 50])
def test_all_keys_are_attention_itself(method, t):
    q, k, v, bias = problem()
    found = few(q, k, v, bias, t, method)
    assert torch.equal(found.chosen, torch.arange(7).expand(2, 7))
    assert torch.equal(answers(q, k, found), attention(q, k, v, bias))


def test_one_key_stands_for_its_twin():
    q, k, v, bias = problem(T=2)
    k, bias = k[:, :1].expand(2, 2, 4), torch.zeros(2, 2).double()
    found = few(q, k, v, bias, 1)
    assert torch.equal(found.chosen, torch.zeros(2, 1, dtype=torch.int64))  # as good as the other, and older
    assert close(found.bias, torch.full_like(found.bias, 2).log(), 2e-3)
    assert close(found.values, v.mean(dim=1, keepdim=True), 4e-3)


@given(st.integers(2, 9), st.integers(1, 20), st.data(), st.integers(0, 10**6))
def test_what_is_fitted_answers_its_queries_better_than_the_same_keys_as_they_are(T, n, data, seed):
    t = data.draw(st.integers(1, T - 1))
    q, k, v, bias = problem(T, n, seed=seed)
    found, plain = few(q, k, v, bias, t, "attention"), few(q, k, v, bias, t, "attended")
    assert torch.equal(found.chosen, plain.chosen) and found.chosen.shape == (2, t)
    whole = attention(q, k, v, bias)
    # By values alone, for the mass as it is, least squares never lose. The pull is towards the keys' own.
    paid = (q @ torch.stack([row[i] for row, i in zip(k, plain.chosen, strict=True)]).mT).softmax(-1)
    plain = plain._replace(bias=torch.zeros_like(plain.bias))
    refitted = fitted(paid, whole, plain.values)
    errors = [(answers(q, k, x) - whole).norm() for x in (plain._replace(values=refitted), plain)]
    assert errors[0] <= errors[1] * (1 + 1e-9)
    assert bool(found.bias.isfinite().all()) and bool(found.values.isfinite().all())


@given(st.integers(2, 7), st.integers(1, 12), st.data(), st.integers(0, 10**6))
def test_the_whole_fit_is_that_of_a_direct_solver(T, n, data, seed):
    t = data.draw(st.integers(1, T - 1))
    q, k, v, bias = problem(T, n, seed=seed)
    found = few(q, k, v, bias, t)
    for row in range(2):
        i = found.chosen[row].numpy()
        scores = (q[row] @ k[row].mT + bias[row]).numpy()
        paid = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        of_kept = paid[:, i]
        # How much each key must weigh for all to take the attention of all keys.
        pull = PULL * (of_kept**2).sum(axis=0).mean()
        weights = best_of_all_supports(of_kept.T @ of_kept + pull * np.eye(t), of_kept.sum(axis=0) + pull)
        heavy = weights > 0
        assert np.allclose((found.bias[row] - bias[row][i]).exp()[heavy], weights[heavy], rtol=1e-6)
        assert bool((found.bias[row][~torch.from_numpy(heavy)] == ABSENT).all())
        # What attention over the kept keys then pays them, and the values that it needs.
        shares = of_kept * weights / (of_kept * weights).sum(axis=1, keepdims=True)
        assert np.allclose((q[row] @ k[row][i].mT + found.bias[row]).softmax(-1), shares, atol=1e-9)
        root = np.sqrt(PULL * (shares**2).sum(axis=0).mean())
        wanted = np.concatenate([paid @ v[row].numpy(), root * v[row][i].numpy()])
        solved = np.linalg.lstsq(np.concatenate([shares, root * np.eye(t)]), wanted, rcond=None)[0]
        assert np.allclose(found.values[row], solved, rtol=1e-5, atol=1e-7)


def test_each_method_keeps_what_it_says():
    q, k, v, bias = problem()
    weights = (q @ k.mT + bias[:, None]).softmax(-1)
    by = {
        "attention": weights.square().mean(dim=1),
        "attended": weights.square().mean(dim=1),
        "norm": -k.norm(dim=-1),
    }
    for method, worth in by.items():
        kept = few(q, k, v, bias, 3, method).chosen
        assert [set(row) for row in kept.tolist()] == [set(row) for row in worth.topk(3).indices.tolist()]
    drawn = [few(*problem(T=40, seed=seed), 3, "random").chosen for seed in range(20)]
    assert len(torch.cat(drawn).unique()) > 30 and torch.equal(
        drawn[0], few(*problem(T=40), 3, "random").chosen
    )


@pytest.mark.parametrize("method", METHODS)
def test_padding_is_kept_last_and_changes_nothing(method):
    q, k, v, bias = problem()
    padded = [torch.cat([torch.zeros_like(x[:, :3]), x], dim=1) for x in (k, v)]
    more = torch.cat([torch.full_like(bias[:, :3], ABSENT), bias], dim=1)
    for t in (2, 6):
        found, alone = few(q, *padded, more, t, method), few(q, k, v, bias, t, method)
        assert torch.equal(found.chosen, alone.chosen + 3)
        assert close(found.values, alone.values, 1e-9) and close(found.bias, alone.bias, 1e-9)
    assert close(answers(q, padded[0], few(q, *padded, more, 9, method)), attention(q, k, v, bias), 1e-9)


def test_a_key_that_once_had_much_attention_stays():
    q, k, v, bias = problem()
    first = few(q, k, v, bias, 7, "attention").worth
    least = first.argmin(dim=1, keepdim=True)
    assert not bool((few(q, k, v, bias, 3).chosen == least).any())
    before = torch.zeros_like(first).scatter(1, least, 2.0)
    for method in ("attention", "attended"):
        again = few(q, k, v, bias, 3, method, before)
        assert bool((again.chosen == least).any(dim=1).all()) and bool((again.worth.amax(dim=1) == 2.0).all())
