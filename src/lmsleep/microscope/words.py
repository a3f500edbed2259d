"""What the microscope saw, in sentences: what does sleep change, and can one rely on it?"""

from statistics import fmean
from typing import TYPE_CHECKING

from lmsleep.microscope.heads import Row

if TYPE_CHECKING:
    from lmsleep.microscope.inspection import Inspection

READABLE = 0.9  # accuracy from which on a probe is said to read a quantity


def changes(seen: "Inspection") -> list[str]:
    """What sleep changes."""
    before, after = seen.about["slow_weights_before"], seen.about["slow_weights_after"]
    if before is None:
        said = "The slow weights of this backbone cannot be hashed: it has no state_dict()."
    elif before == after:
        said = f"Not the slow weights: their SHA-256 is {before[:16]}… before and after."
    else:
        said = (
            f"The slow weights have changed, from {before[:16]}… to {after[:16]}…: a fault of this backbone."
        )
    moved = {
        key: fmean(r[key] for r in seen.change) for key in ("moved_awake", "moved_asleep", "awake", "cosine")
    }
    N = seen.about["passes"]
    windows = f"{len(seen.change)} window{'s' if len(seen.change) > 1 else ''}"
    if N == 1:
        return [said, f"N = 1: no sleep. One pass moved S by {moved['moved_awake']:.3g} (mean of {windows})."]
    return [
        said,
        f"The fast weights S, mean of {windows}: the first pass moved them by {moved['moved_awake']:.3g} "
        f"(Frobenius norm); the {N - 1} further passes, asleep, moved them on by {moved['moved_asleep']:.3g}, "
        f"{moved['moved_asleep'] / max(moved['awake'], 1e-30):.0%} of the norm that one pass had left. What the "
        f"sleep leaves has a cosine of {moved['cosine']:.2f} with what one pass leaves.",
    ]  # fmt: skip


def reliability(seen: "Inspection") -> list[str]:
    """Whether one can rely on it."""
    said = []
    if seen.reliance:
        figures = [
            f"{r['reading']}: {r['accuracy']:.3f} ({r['nats']:.2f} nats a token)" for r in seen.reliance
        ]
        chance = seen.about["floors"].get("chance")
        said.append(
            f"Answers right, of {seen.about['asked']} tokens asked: " + "; ".join(figures)
            + ("." if chance is None else f"; by chance: {chance:.3f}.")
        )  # fmt: skip
    single = [r for r in seen.ablation if r["block"] is not None and r["how"] == "zero"]
    if single:
        worst = max(single, key=lambda r: r["nats_lost"])
        idle = sum(r["nats_lost"] < 0.01 for r in single)
        said.append(
            f"Of {len(single)} heads, erasing head {worst['head']} of block {worst['block']} costs most: accuracy "
            f"{worst['accuracy']:.3f}, {worst['nats_lost']:.2f} nats a token lost. Erasing any one of {idle} "
            "others costs less than 0.01 nats."
        )
    if seen.readback:
        said.append(_retrieved(seen.readback))
    if seen.probe:
        said.append(_frontier(seen.probe))
    return said


def _retrieved(rows: list[Row]) -> str:
    first, last = min(r["window"] for r in rows), max(r["window"] for r in rows)

    def share(window: int, column: str) -> float:
        best: dict[int, float] = {}
        for r in rows:
            if r["window"] == window:
                best[r["place"]] = max(best.get(r["place"], 0.0), r[column])
        return fmean(best.values())

    said = f"From its best head a token of window {last} is retrieved by its key in {share(last, 'retrieved'):.0%} of cases"
    if first == last:
        return said + "."
    return (
        said + f"; one of window {first}, at the end of the stream, in {share(first, 'retrieved_end'):.0%}."
    )


def _frontier(rows: list[Row]) -> str:
    """Up to how many steps a probe reads, pass by pass, in the last window."""
    last = max(r["window"] for r in rows)
    reached = []
    for n in sorted({r["pass"] for r in rows} - {0}):
        mine = sorted((r["steps"], r["accuracy"]) for r in rows if (r["window"], r["pass"]) == (last, n))
        far = next((j for j, accuracy in mine if accuracy < READABLE), mine[-1][0] + 1) - 1
        reached.append(f"pass {n}: {far if far >= 0 else 'none'}")
    return (
        f"A linear probe reads off the hidden states of window {last}, with an accuracy of at least {READABLE}, "
        f"steps ahead up to: {', '.join(reached)}."
    )
