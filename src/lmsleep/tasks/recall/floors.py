"""What is reached without knowing what belongs to what: guesses among the answers of a text, constants."""

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

from lmsleep.tasks.recall import documents
from lmsleep.tasks.recall.planted import HOP, HOPS, RELATIONS, TOLD, TRAINED_NAMES, UNSEEN_NAMES, label
from lmsleep.tasks.recall.story import Question


def floors(asked: Sequence[Question], problems: int, of_problems: Mapping[str, float]) -> dict[str, float]:
    """Return the floors of accuracy over questions that were drawn, and of each kind.

    Args:
        asked: questions about facts and documents.
        problems: how many problems were drawn beside them.
        of_problems: the floors of these, empty if there are none.
    """
    chances: dict[str, list[float]] = {}
    for question in asked:
        chances.setdefault(question.kind, []).append(1 / question.candidates)
    counts = Counter(question.kind for question in asked)
    # How many questions the best constant of each relation is right on: its values are equally likely.
    right = {name: counts[name] * _constant(name) for name in RELATIONS}
    for name in HOPS:
        right[name] += counts[HOP] / len(HOPS) * _constant(name)
    for kind in documents.KINDS:
        right[kind] = (
            Counter(q.answer for q in asked if q.kind == kind).most_common(1)[0][1] if counts[kind] else 0
        )
    every = [chance for some in chances.values() for chance in some]
    every += problems * [of_problems.get("chance", 0)]
    best = max(*right.values(), problems * of_problems.get("constant", 0))
    found = {"chance": fmean(every), "constant": best / len(every)}
    constants: dict[str, float] = {}
    for kind, some in chances.items():
        # However it is told, it is as hard to guess.
        for told in TOLD if kind in RELATIONS or kind == HOP else TOLD[:1]:
            name = f"kind={label(kind, told)}"
            found[f"chance {name}"] = fmean(some)
            if kind == HOP:
                constants[f"constant {name}"] = max(_constant(of, told) for of in HOPS) / len(HOPS)
            elif kind in RELATIONS:
                constants[f"constant {name}"] = _constant(kind, told)
            else:
                constants[f"constant {name}"] = right[kind] / counts[kind]
    of_ops = {
        name.replace(" op=", " kind=op"): value for name, value in of_problems.items() if " op=" in name
    }
    # Of problems every operation has the chance of all.
    for name in of_ops:
        found.setdefault(name.replace("constant", "chance", 1), of_problems["chance"])
    return found | constants | of_ops


def _constant(relation: str, told: str = TOLD[0]) -> float:
    """Return the share of the questions about a relation that the best constant answer is right on."""
    if relation == "friend":
        return 1 / len(UNSEEN_NAMES if told == "names" else TRAINED_NAMES)
    return 1 / len(RELATIONS[relation].values)
