"""Which hard problems are drawn too often: the share of each that is kept, which leaves the original's mix.

The rules that GSM-Infinite's description gives leave open what hard problems are made of; by these rules
alone other parameters come up than in what its generator puts out. `tools/thinning.py` compares both and
writes this table.
"""

from collections.abc import Sequence
from random import Random

from lmsleep.tasks.gsm_infinite.structure import Kind, Parameter

LETTERS: dict[Kind, str] = {"average": "a", "count": "c", "total": "t", "attributes": "T"}
# By operations: of problems whose necessary parameters are of these kinds, in order, the share that is kept;
# "": that of all others.
KEPT: dict[int, dict[str, float]] = {
    2: {"": 1, "aa": 0.34, "ct": 0.1, "ca": 0.43, "ac": 1},
    3: {"": 1, "aa": 0.29, "cta": 0.13, "act": 0.28, "ctc": 0.04, "ac": 0.85, "cct": 0.01, "ca": 1},
    4: {"": 1, "cct": 0.22, "act": 0.9, "cta": 1, "ctc": 0.3},
    5: {
        "": 1,
        "ccta": 0.1,
        "acct": 0.23,
        "acT": 0.31,
        "caT": 0.11,
        "aaa": 0.76,
        "cct": 0.42,
        "cta": 0.05,
        "cact": 0.04,
    },
    6: {"": 1, "ccct": 0.41, "ccta": 1, "acct": 0.99, "aaa": 0, "cact": 0.73},
    7: {
        "": 0.99,
        "ctaT": 0,
        "acTa": 0.16,
        "caTa": 0.11,
        "ccta": 0.24,
        "ccct": 0.21,
        "accta": 0.47,
        "aacT": 0.25,
        "aaaa": 0.99,
        "cccta": 0.14,
        "acaT": 0.06,
        "aacct": 0.49,
        "accct": 0.26,
        "acct": 0.19,
        "aacTa": 0.24,
        "acaTa": 0.07,
        "aaacT": 0.32,
        "cctaa": 0.81,
        "aaaaa": 1,
        "acTct": 0.15,
        "aacaT": 0.08,
        "caTct": 0.15,
        "ctcaT": 0.06,
        "acTaa": 0.35,
        "caTaa": 0.11,
        "acta": 0.02,
    },
    8: {
        "": 0.77,
        "cccta": 0.47,
        "accct": 0.56,
        "accta": 0.52,
        "cctcct": 0.02,
        "acccta": 0.05,
        "cccct": 0.24,
        "acaTa": 0.06,
        "aacTa": 0.23,
        "acTa": 0,
        "aaaa": 0.02,
        "aacct": 0.74,
        "caTa": 0,
        "aaaaa": 1,
        "cctaa": 0.95,
        "ccta": 0.03,
        "aaccct": 0.15,
        "aaacT": 0.3,
        "caTcct": 0.04,
        "aaccta": 0.17,
        "cctcaT": 0.02,
        "ccct": 0.45,
        "acTaa": 0.59,
        "acTct": 0.1,
        "acTcct": 0.05,
        "aacT": 0,
        "aacaT": 0.18,
        "cctacT": 0.09,
        "ccctaa": 0.06,
        "acaT": 0,
        "acctaa": 0.3,
        "caTaa": 0.36,
        "caTct": 0.07,
    },
}


def kinds(order: Sequence[Parameter]) -> str:
    """Return the kinds of parameters as letters."""
    return "".join(LETTERS[p.kind] for p in order)


def thinned(random: Random, order: Sequence[Parameter], ops: int) -> bool:
    """Tell, by chance, whether a hard forward problem of these necessary parameters is to be drawn anew."""
    kept = KEPT.get(ops)
    return kept is not None and random.random() >= kept.get(kinds(order), kept[""])
