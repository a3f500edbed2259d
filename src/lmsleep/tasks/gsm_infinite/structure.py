"""What can be counted: places, the kinds of things in them, and the parameters that follow."""

import math
from dataclasses import dataclass
from functools import cache, cached_property
from random import Random
from typing import Literal, NamedTuple

Kind = Literal["count", "average", "total", "attributes"]
MAX_EDGES = 20  # before the cap by the widths


class Parameter(NamedTuple):
    """A number of the problem.

    `count` of a kind of thing in a place and, in hard problems, the `average` of its attribute are stated. A
    place's `total` (the sum of its counts) and `attributes` (the sum of count times average) never are: they
    have thing -1.
    """

    kind: Kind
    place: int
    thing: int = -1


@dataclass(frozen=True)
class Structure:
    """Which things are where: `things[place]` in ascending order."""

    things: tuple[tuple[int, ...], ...]
    hard: bool

    @cached_property
    def instances(self) -> list[Parameter]:
        """The parameters that are stated."""
        kinds: tuple[Kind, ...] = ("count", "average") if self.hard else ("count",)
        return [Parameter(k, p, t) for k in kinds for p, things in enumerate(self.things) for t in things]

    @cached_property
    def totals(self) -> list[Parameter]:
        """The parameters that are implied, of the highest level first."""
        kinds: tuple[Kind, ...] = ("attributes", "total") if self.hard else ("total",)
        return [Parameter(kind, place) for kind in kinds for place in range(len(self.things))]

    def summands(self, total: Parameter) -> list[Parameter]:
        """Return the instance parameters that a total depends on; those of `attributes` in pairs."""
        place, things = total.place, self.things[total.place]
        counts = [Parameter("count", place, t) for t in things]
        if total.kind == "total":
            return counts
        return [p for c in counts for p in (c, Parameter("average", place, c.thing))]


def draw_structure(random: Random, size: int, *, hard: bool, reverse: bool) -> Structure | None:
    """Draw places and things for problems of about `2 size` operations; None if a place stays empty.

    Widths, edges and growth follow GSM-Infinite; where its hard problems may ask for more edges than two
    layers can hold (and are thrown away), we take as many as there can be.
    """
    w0, w1 = sorted(_width(random, size, hard=hard, reverse=reverse) for _ in range(2))
    low = (2 if hard else 1) * w0
    edges = min(random.randint(low, MAX_EDGES), random.randint(low, MAX_EDGES), w1 * w1 + (w1 if hard else 0))
    places, things = _grow(random, w0, w1, edges)
    if edges > places * things:
        return None
    return _connect(random, places, things, edges, hard=hard)


@cache
def _width_weights(size: int) -> list[float]:
    # Sizes 1 ... 20 on a line from 0 to 1; the larger a problem, the wider its layers tend to be.
    place = (size - 1) / 19
    return [math.exp(-((place - centre) ** 2)) for centre in (0.1, 0.3, 0.5, 0.7, 0.9)]


def _width(random: Random, size: int, *, hard: bool, reverse: bool) -> int:
    width = random.choices((1, 2, 3, 4, 5), _width_weights(size))[0]
    if size <= 5 and reverse:
        return min(width, 3)
    return max(width, 2) if size <= 5 and not hard else width


def _grow(random: Random, width: int, most: int, edges: int) -> tuple[int, int]:
    """Draw the numbers of places and things: enough for the edges, then a little more."""
    sizes, more = [width, width], random.random()
    while min(sizes) < most:
        enough = sizes[0] * sizes[1] >= edges
        if enough and (max(sizes) >= edges or random.random() >= more):
            break
        sizes[random.choice([i for i in (0, 1) if sizes[i] < most])] += 1
    return sizes[0], sizes[1]


def _connect(random: Random, places: int, things: int, edges: int, *, hard: bool) -> Structure | None:
    """Put every thing somewhere, then draw edges at random, to empty places first."""
    there: list[set[int]] = [set() for _ in range(places)]
    for thing in range(things):
        random.choice(there).add(thing)
    more = edges - things
    for place in there:
        if not place:
            if more <= 0:
                return None
            place.add(random.randrange(things))
            more -= 1
    if more > 0:
        absent = [(place, thing) for place in there for thing in range(things) if thing not in place]
        for place, thing in random.sample(absent, more):
            place.add(thing)
    return Structure(tuple(tuple(sorted(place)) for place in there), hard)
