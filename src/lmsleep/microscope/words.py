"""What the microscope saw, in sentences: what does sleep change, and can one rely on it?"""

from statistics import fmean

from lmsleep.microscope.seen import Row, Seen

READABLE = 0.9  # accuracy from which on a probe is said to read a quantity


def changes(seen: Seen) -> list[str]:
    """Say what sleep changes, in sentences."""
    before, after = seen.about["slow_weights_before"], seen.about["slow_weights_after"]
    if before is None:
        said = "The slow weights of this backbone cannot be hashed: it has no state_dict()."
    elif before == after:
        said = f"Not the slow weights: their SHA-256 is {before[:16]}… before and after."
    else:
        said = (
            f"The slow weights have changed, from {before[:16]}… to {after[:16]}…: a fault of this backbone."
        )
    moved = {key: fmean(r[key] for r in seen.change) for key in ("moved_awake", "moved_asleep")}
    N, way = seen.about["passes"], seen.about["way"]
    reading, sleep, once = "the first pass", f"the {N - 1} further passes, asleep,", "one pass"
    if way != "passes":
        reading, sleep, once = "reading a window", f"the sleep ({way}, N = {N})", "reading"
    first = (
        f"The fast weights S (windows: {len(seen.change)}, mean): {reading} moved them by "
        f"{moved['moved_awake']:.3g} (norm)"
    )
    if N == 1:
        return [said, f"{first}; N = 1, so there was no sleep."]
    then = f"{first}; {sleep} moved them on by {moved['moved_asleep']:.3g}"
    # Some ways to sleep begin with S = 0, and leave it so while they read.
    told = [r for r in seen.change if r["cosine"] is not None]
    if not told:
        return [said, f"{then}."]
    share = fmean(r["moved_asleep"] for r in told) / fmean(r["awake"] for r in told)
    return [
        said,
        f"{then}, {share:.0%} of the norm that {once} had left. What the sleep leaves has a cosine of "
        f"{fmean(r['cosine'] for r in told):.2f} with what {once} leaves.",
    ]


def layers(seen: Seen) -> list[str]:
    """Say what the three layers of memory are, and what each takes, in sentences."""
    working, fast, slow = seen.layers
    eviction = seen.about["eviction"]
    kept = f"{working['kept']:,} {'keys a head' if eviction == 'compact' else 'tokens'}"
    rest = f", of which {working['kept_bytes']:,} stay ({eviction}: {kept})" if working["kept_bytes"] else ""
    adapter = f", {slow['adapter_bytes']:,} of them an adapter" if slow["adapter_bytes"] else ""
    blocks = ", ".join(map(str, fast["blocks"]))
    return [
        f"Working memory, keys and values of a window of {seen.about['window']:,} tokens: at most "
        f"{working['bytes']:,} bytes a sequence{rest or f', none of which stay ({eviction})'}.",
        f"Fast weights, S of block {blocks}, written by {fast['method']} with N = {seen.about['passes']}: "
        f"{fast['bytes']:,} bytes a sequence.",
        f"Slow weights, the model: {slow['bytes']:,} bytes{adapter}.",
    ]


def reliability(seen: Seen) -> list[str]:
    """Say how far one can rely on it, in sentences."""
    said = []
    if seen.reliance:
        figures = [f"{r['reading']}: {r['accuracy']:.3f} ({r['nats']:.2f} nats)" for r in seen.reliance]
        chance = seen.about["floors"].get("chance")
        said.append(
            f"Answers right, of {seen.about['asked']} tokens asked: " + "; ".join(figures)
            + ("." if chance is None else f"; by chance: {chance:.3f}.")
        )  # fmt: skip
    single = [r for r in seen.ablation if r["block"] is not None and r["how"] == "zero"]
    if single:
        worst = max(single, key=lambda r: r["nats_lost"])
        idle = sum(r["nats_lost"] < 0.01 for r in single if r is not worst)
        said.append(
            f"Of {len(single)} heads, erasing head {worst['head']} of block {worst['block']} costs most: "
            f"accuracy {worst['accuracy']:.3f}, {worst['nats_lost']:.2f} nats a token lost. Erasing any one "
            f"of {idle} others costs less than 0.01 nats."
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

    said = (
        f"Of the tokens of window {last}, {share(last, 'retrieved'):.0%} are retrieved by their own keys "
        "after its sleep (each from its best head)"
    )
    if first == last:
        return f"{said}."
    return (
        f"{said}; of those of window {first}, {share(first, 'retrieved_end'):.0%} at the end of the stream."
    )


def _frontier(rows: list[Row]) -> str:
    """Say up to how many steps a probe reads, pass by pass, in the last window."""
    last = max(r["window"] for r in rows)
    reached = []
    for n in sorted({r["pass"] for r in rows} - {0}):
        mine = sorted((r["steps"], r["accuracy"]) for r in rows if (r["window"], r["pass"]) == (last, n))
        far = next((j for j, accuracy in mine if accuracy < READABLE), mine[-1][0] + 1) - 1
        reached.append(f"pass {n}: {far if far >= 0 else 'not even 0'}")
    return (
        f"A linear probe reads off the hidden states of window {last}, with an accuracy of {READABLE} or "
        f"more, up to this many steps ahead: {', '.join(reached)}."
    )
