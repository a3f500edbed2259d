"""Which parameter is computed from which: the necessary ones in order, the query last, and distractors.

The algorithm is that of GSM-Infinite (arXiv 2502.05252), after iGSM (arXiv 2407.20311): choose the necessary
parameters, order them from the query back, give each its operands. Written from a description of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from lmsleep.tasks.gsm_infinite.structure import Parameter, Structure, draw_structure

MOST_OPS = 20
# How often a short order gets one more parameter.
LENGTHENED, LENGTHENED_HARD = 0.5, 0.75
# The bound O that a problem of so many operations is drawn with: (highest op count, O).
BOUNDS = ((1, 1), (2, 3), (4, 4), (6, 6), (9, 10), (11, 15), (15, 20), (18, 25), (MOST_OPS, 30))

Operand = Parameter | None  # None: a constant


@dataclass(frozen=True)
class Graph:
    """A problem without its numbers.

    Attributes:
        structure: places and things.
        order: necessary parameters, each after all that it depends on; the last is the query.
        operands: of every instance parameter, necessary or not.
    """

    structure: Structure
    order: list[Parameter]
    operands: dict[Parameter, list[Operand]]

    @property
    def ops(self) -> int:
        """The number of operations: operands of the necessary parameters, constants included."""
        return sum(map(self.in_degree, self.order))

    def in_degree(self, parameter: Parameter) -> int:
        """Count the operands of a parameter; a total has its summands."""
        if parameter.thing < 0:
            return len(self.structure.summands(parameter))
        return len(self.operands[parameter])


def draw_graph(random: Random, ops: int, *, hard: bool, reverse: bool) -> Graph | None:
    """Draw a graph of exactly `ops` operations; None if the draw came to another number or to nothing."""
    bound = next(bound for most, bound in BOUNDS if ops <= most)
    size = (bound + 1) // 2
    # The larger of two draws leaves more room to totals.
    few = max(random.randint(1, size), random.randint(1, size))
    many = random.randint(few, size)
    structure = draw_structure(random, size, hard=hard, reverse=reverse)
    if structure is None:
        return None
    necessary = _necessary(random, structure, few, many)
    ordered = _order(random, structure, necessary, reverse=reverse)
    if ordered is None:
        return None
    order, linked = ordered
    operands = _operands(random, structure, order, linked, size)
    if operands is None:
        return None
    graph = Graph(structure, order, operands)
    # Rejection leaves the distribution as it is among problems of exactly `ops` operations.
    if graph.ops != ops:
        return None
    # Distractors come last: they take draws, but none is wasted on a graph that is thrown away.
    operands.update(_distractors(random, structure, order))
    return graph


def _necessary(random: Random, structure: Structure, few: int, many: int) -> list[Parameter]:
    """Choose totals of at most `few` operations with all that they depend on, and instances up to `many`."""
    # A dict for its order: the order of a set of tuples of strings differs from process to process.
    chosen: dict[Parameter, None] = {}
    ops = 0
    for kind in ("attributes", "total"):
        totals = [t for t in structure.totals if t.kind == kind]
        random.shuffle(totals)
        for total in totals:
            summands = structure.summands(total)
            cost = len(summands)
            if structure.hard:
                # Found by comparing results: the original holds totals for dearer than they turn out.
                cost = cost * 3 // 2 if kind == "attributes" else max(cost, 2)
            if ops + cost <= few:
                ops += cost
                chosen |= dict.fromkeys([*summands, total])
    unused, room = [p for p in structure.instances if p not in chosen], many - ops - 1
    if structure.hard:  # the rule for medium problems would all but leave averages out; see docs/tasks.md
        unused, room = [p for p in unused if p.kind == "average"], room + 1
    return [*chosen, *random.sample(unused, min(max(room, 0), len(unused)))]


def _order(
    random: Random, structure: Structure, necessary: Sequence[Parameter], *, reverse: bool
) -> tuple[list[Parameter], dict[Parameter, list[Operand]]] | None:
    """Put the necessary parameters in order; return them and the operands that it took to connect them."""
    users: dict[Parameter, set[Parameter]] = {p: set() for p in necessary}
    linked: dict[Parameter, list[Operand]] = {p: [] for p in necessary}
    for total in necessary:
        if total.thing < 0:
            for summand in structure.summands(total):
                users[summand].add(total)
    # The query is used by nothing, and everything is placed from it back to what it depends on.
    tops = [p for p in necessary if not users[p]]
    if not tops:
        return None
    back = [random.choice(_preferred(tops) if reverse else tops)]
    left = [p for p in necessary if p != back[0]]
    often = random.random()
    while left:
        last, placed = back[-1], set(back)
        ready = [p for p in left if users[p] and users[p] <= placed]
        if last.thing >= 0 and (not ready or random.random() < often):
            free = left if ready else [p for p in left if users[p] <= placed]
            link = _weighted(random, free, users, placed)
            linked[last].append(link)
            users[link].add(last)
            ready = [p for p in left if users[p] and users[p] <= placed]
        if not ready:
            return None
        back.append(random.choice(ready))
        left.remove(back[-1])
    # Told from its end the order has every parameter after all that it depends on.
    order = back[::-1]
    stated = [p for p in order if p.thing >= 0]
    short = len(stated) == 1 if structure.hard else len(order) == 2
    if short and random.random() < (LENGTHENED_HARD if structure.hard else LENGTHENED):
        _lengthen(random, structure, order, linked)
    return order, linked


def _preferred(tops: list[Parameter]) -> list[Parameter]:
    """Return the parameters of the highest level: these end a problem that is told in reverse."""
    totals = [p for p in tops if p.thing < 0]
    return [p for p in totals if p.kind == "attributes"] or totals or tops


def _weighted(
    random: Random, among: list[Parameter], users: dict[Parameter, set[Parameter]], placed: set[Parameter]
) -> Parameter:
    # How far totals, and parameters that are in use already, are preferred is drawn for each link.
    strength = abs(random.gauss(0, 1))
    weights = [math.exp(strength * ((p.thing < 0) + bool(users[p] & placed))) for p in among]
    return random.choices(among, weights)[0]


def _lengthen(
    random: Random, structure: Structure, order: list[Parameter], linked: dict[Parameter, list[Operand]]
) -> None:
    """Add one more instance parameter before or after a short order."""
    unused = [p for p in structure.instances if p not in order]
    if not unused:
        return
    extra = random.choice(unused)
    if random.random() < 0.5:
        linked[extra] = []
        linked[order[0]].append(extra)
        order.insert(0, extra)
    else:
        linked[extra] = [order[-1]]
        order.append(extra)


def _operands(
    random: Random,
    structure: Structure,
    order: list[Parameter],
    linked: dict[Parameter, list[Operand]],
    size: int,
) -> dict[Parameter, list[Operand]] | None:
    """Draw operands of the necessary instance parameters; None if they cannot reach `size` operations."""
    degree = [len(structure.summands(p) if p.thing < 0 else linked[p]) for p in order]
    while sum(degree) < size:
        # A total has the summands that it has; another parameter takes at most 3 operations, on what precedes
        # it.
        room = [i for i, p in enumerate(order) if p.thing >= 0 and degree[i] < min(3, max(1, i))]
        if not room:
            return None
        degree[random.choice(room)] += 1
    operands: dict[Parameter, list[Operand]] = {}
    for i, p in enumerate(order):
        if p.thing < 0:
            continue
        # k operations join k + 1 operands; where it is one, a single operand may stand alone.
        wanted = random.choice((1, 2)) if degree[i] == 1 else degree[i] + 1
        have = linked[p]
        pool = [q for q in order[:i] if q not in have]
        operands[p] = have + _some(random, pool, min(wanted, i + 1) - len(have))
    return operands


def _distractors(
    random: Random, structure: Structure, order: list[Parameter]
) -> dict[Parameter, list[Operand]]:
    """Draw definitions of all other parameters of these places: of their own family, or of anything.

    They may go in circles, for the total of a place may define what it sums.
    """
    operands: dict[Parameter, list[Operand]] = {}
    family: list[Parameter] = []
    known = order + [total for total in structure.totals if total not in order]
    unused = [p for p in structure.instances if p not in order]
    random.shuffle(unused)
    for p in unused:
        own = random.random() < 0.5
        pool = family if own else known
        wanted = 1
        while wanted < min(4, len(pool) + 1) and random.random() < 0.5:
            wanted += 1
        operands[p] = _some(random, pool, wanted)
        known.append(p)
        if own:
            family.append(p)
    return operands


def _some(random: Random, pool: list[Parameter], number: int) -> list[Operand]:
    """Take pool and constant if so many are wanted; else the constant with probability 1/2, and others."""
    if number > len(pool):
        return [None, *pool]
    if number > 0 and random.random() < 0.5:
        return [None, *random.sample(pool, number - 1)]
    return [*random.sample(pool, max(number, 0))]
