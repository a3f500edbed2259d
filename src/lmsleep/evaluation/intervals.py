"""Confidence intervals: of a proportion, and of a mean over seeds."""

import math
from collections.abc import Iterable

import torch


def wilson(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % confidence interval (low, high) of a proportion: Wilson's score interval."""
    if total == 0:
        return 0.0, 1.0
    p, zz = correct / total, z * z / total
    centre = (p + zz / 2) / (1 + zz)
    half = z * math.sqrt(p * (1 - p) / total + zz / total / 4) / (1 + zz)
    return max(0.0, centre - half), min(1.0, centre + half)


# 97.5 % quantile of Student's t with 1 ... 30 degrees of freedom
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def mean_interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Return the mean over seeds with its 95 % confidence interval by Student's t: (mean, low, high)."""
    x = torch.tensor(list(values), dtype=torch.float64)
    mean = float(x.mean())
    if len(x) < 2:
        return mean, math.nan, math.nan
    # n values have n - 1 degrees of freedom; beyond 30 the normal quantile is near enough.
    t = T_975[len(x) - 2] if len(x) - 2 < len(T_975) else 1.96
    half = t * float(x.std()) / math.sqrt(len(x))
    return mean, mean - half, mean + half
