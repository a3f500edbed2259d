"""Noise: statements about other places that hang on the problem and on which nothing hangs.

The "spider" of GSM-Infinite: its body is the problem, its legs point outward, so that no answer changes.
"""

from collections.abc import Iterator, Sequence
from random import Random

from lmsleep.tasks.gsm_infinite.language import Language, Tokens
from lmsleep.tasks.gsm_infinite.meaning import Definition, draw_form
from lmsleep.tasks.gsm_infinite.structure import Kind

GROUPS = 2  # of things, in a place of noise
STATEMENTS = 20  # about a place of noise
# Where noise has numbers: statements that are a number, and others that have one. As in problems.
NUMBER, WITH_NUMBER = 0.35, 0.35

ONE, SUM, DIFFERENCE = Definition(()), Definition(()), Definition((), difference=True)


def noise(
    random: Random, language: Language, core: Sequence[Tokens], *, hard: bool, most: int | None
) -> Iterator[Tokens]:
    """Yield statements in the template's noise names, until all 640 places are used up.

    Each parameter is one parameter of `core` (names as tokens), or the sum or difference of two; of a place's
    statements with one, one also has the total of the place before. In hard problems a thing has a count and
    an average. With `most` there are numbers up to it among them as in problems, without it there are none.
    """
    kinds: tuple[Kind, ...] = ("count", "average") if hard else ("count",)
    places, groups = language.template.all_noise_places, language.template.all_noise_things
    total: Tokens | None = None
    uniform, name, statement = random.random, language.name, language.statement
    used: set[str] = set()
    while len(used) < len(places):
        place = random.choice(places)
        if place in used:
            continue
        used.add(place)
        things = [thing for group in random.sample(groups, GROUPS) for thing in group]
        for thing in random.sample(things, STATEMENTS // len(kinds)):
            for kind in kinds:
                operands = [core[int(uniform() * len(core))]]
                if len(core) > 1 and uniform() < 0.5:
                    other = core[int(uniform() * (len(core) - 1))]
                    operands.append(core[-1] if other is operands[0] else other)
                elif total is not None:
                    operands.append(total)
                    total = None
                if most is None:
                    definition = DIFFERENCE if len(operands) == 2 and uniform() < 0.5 else SUM
                else:
                    operands = [] if uniform() < NUMBER else operands
                    definition = draw_form(random, len(operands), uniform() < WITH_NUMBER, most)
                yield statement(name(kind, place, thing, capital=True), definition, operands)
        total = name("total", place)
