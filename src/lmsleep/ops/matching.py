"""Few keys in place of many: attention matching (arXiv 2602.16284), and what it is compared with.

Attention over `T` keys is `softmax(q k + bias) v`. Of these keys `t` are kept, and then fitted so that for
some queries they do what all did: a bias to each score, so that together they take the attention that all
took (`mass`), and a value each, so that attention returns what it returned (`fitted`). Both are least
squares, solved at once, in float64. Each is pulled, ever so weakly, towards keeping a key as it is: that
decides where the queries leave open what fits, so no problem is singular.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lmsleep.state import ABSENT

Method = Literal["attention", "attended", "norm", "random"]
METHODS: tuple[Method, ...] = get_args(Method)
PULL = 1e-3  # against the mean square of a column; ten times more or less does as well
MAX_EXCHANGES = 100  # of the solver: it needs a handful


class Few(NamedTuple):
    """The keys that are kept.

    Attributes:
        chosen: `[..., t]` int64, ascending: which of the `T` keys.
        worth: `[..., t]`, by which they were chosen: the larger, the sooner a key is kept.
        bias: `[..., t]`, added to their scores; `ABSENT` where a key is of no use.
        values: `[..., t, V]`.
    """

    chosen: Tensor
    worth: Tensor
    bias: Tensor
    values: Tensor


def few(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    t: int,
    method: Method = "attention",
    worth: Tensor | None = None,
) -> Few:
    """Keep `t` of `T` keys.

    Methods: "attention" keeps the keys with the most attention (its root mean square over the queries) and
    fits biases and values; the others fit nothing: "attended" keeps the same keys, "norm" those of smallest
    norm (Devoto et al., arXiv 2406.11430), "random" any.

    Args:
        queries: `[..., n, K]`, scaled: scores are `queries @ keys.mT + bias`.
        keys: `[..., T, K]`.
        values: `[..., T, V]`.
        bias: `[..., T]`; keys with `ABSENT` are padding, and are kept last.
        t: how many are kept, at least 1; all where there are no more.
        method: which keys, and whether they are fitted.
        worth: `[..., T]`, what keys were worth before: one that had much attention stays, though these
            queries ask for others. None: nothing.

    Returns:
        The keys; bias and values have the dtype of `bias` and `values`.
    """
    t = min(t, keys.shape[-2])
    attention = (queries @ keys.mT + bias[..., None, :]).softmax(dim=-1)
    worth = _worth(keys, attention, method, worth)
    rank = worth.masked_fill(bias <= ABSENT, -torch.inf)
    # Of two keys as good as each other the older one, on any machine.
    index = rank.argsort(dim=-1, descending=True, stable=True)[..., :t].sort(dim=-1).values
    worth, old_bias = worth.gather(-1, index), bias.gather(-1, index)
    old_values = values.gather(-2, index[..., None].expand(*index.shape, values.shape[-1]))
    if method != "attention" or t == keys.shape[-2]:
        return Few(index, worth, old_bias, old_values)
    outputs = (attention @ values).double()
    paid = attention.gather(-1, index[..., None, :].expand(*attention.shape[:-1], t)).double()
    weights = mass(paid)
    new_bias = (old_bias + weights.log()).clamp(min=ABSENT).to(bias.dtype)
    paid = paid * weights[..., None, :]
    shares = paid / paid.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    new_values = fitted(shares, outputs, old_values.double()).to(values.dtype)
    return Few(index, worth, new_bias, new_values)


def _worth(keys: Tensor, attention: Tensor, method: Method, before: Tensor | None) -> Tensor:
    """Return `[..., T]`: the larger, the sooner a key is kept."""
    if method == "norm":
        return -keys.norm(dim=-1)
    if method == "random":
        # Drawn from the key itself, so the same in any batch: digits that nobody chose.
        return (keys.double().sum(dim=-1) * 1e4).frac().abs()
    paid = attention.square().mean(dim=-2)
    return paid if before is None else torch.maximum(paid, before)


def mass(paid: Tensor) -> Tensor:
    """Return how much the kept keys must weigh to take all attention: non-negative least squares.

    Args:
        paid: `[..., n, t]` float64: what part of its attention each query pays to each kept key.

    Returns:
        `[..., t]`, w >= 0 with the least `|paid w - 1|^2 + pull |w - 1|^2`: every query counts alike, however
        large its scores.
    """
    gram = paid.mT @ paid
    pull = _pull(gram)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return non_negative(gram + pull[..., None] * eye, paid.sum(dim=-2) + pull)


def fitted(shares: Tensor, outputs: Tensor, values: Tensor) -> Tensor:
    """Return the values with which attention gives the outputs: least squares.

    Args:
        shares: `[..., n, t]` float64: the attention that each query pays to each kept key.
        outputs: `[..., n, V]`: what it is to be given.
        values: `[..., t, V]`: the keys' own.

    Returns:
        `[..., t, V]`, C with the least `|shares C - outputs|^2 + pull |C - values|^2`.
    """
    gram = shares.mT @ shares
    pull = _pull(gram)[..., None]
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(gram + pull * eye)
    return torch.cholesky_solve(shares.mT @ outputs + pull * values, factor)


def _pull(gram: Tensor) -> Tensor:
    """Return `[..., 1]`: `PULL` against the mean square of the columns whose products are `gram`."""
    return PULL * gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1, keepdim=True).clamp(min=1e-30)


def non_negative(gram: Tensor, target: Tensor) -> Tensor:
    """Return the w >= 0 with the least `w gram w - 2 target w`: block principal pivoting.

    Júdice and Pires 1994: guess which w are zero, solve for the others, and exchange those that come out with
    the wrong sign; all at once while that makes them fewer, else the last of them alone, which ends in
    finitely many steps.

    Args:
        gram: `[..., t, t]`, symmetric and positive definite.
        target: `[..., t]`.
    """
    shape, t = target.shape, target.shape[-1]
    gram, target = gram.reshape(-1, t, t), target.reshape(-1, t)
    free = torch.ones_like(target, dtype=torch.bool)
    fewest = free.new_full((len(target),), t + 1, dtype=torch.int64)
    patience = torch.full_like(fewest, 3)
    eye = torch.eye(t, dtype=gram.dtype, device=gram.device)
    slack = 1e-12 * target.abs().amax(dim=-1, keepdim=True)
    for _ in range(MAX_EXCHANGES):
        both = free[:, :, None] & free[:, None, :]
        factor, _ = torch.linalg.cholesky_ex(torch.where(both, gram, eye))
        w = torch.cholesky_solve(target.where(free, 0.0)[..., None], factor)[..., 0]
        slope = (gram @ w[..., None])[..., 0] - target
        wrong = torch.where(free, w < 0, slope < -slack)
        count = wrong.sum(dim=-1)
        if not bool(count.any()):
            break
        better = count < fewest
        patience = torch.where(better, 3, patience - 1)
        fewest = torch.minimum(fewest, count)
        # The last wrong one alone: in reversed order it is the first.
        last = wrong & (wrong.flip(-1).cumsum(dim=-1).flip(-1) == 1)
        free = free ^ torch.where((better | (patience >= 0))[:, None], wrong, last)
    return w.clamp(min=0).view(shape)
