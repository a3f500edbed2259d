"""What the parameters are worth: constants, values, and the core of a problem as a whole."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from lmsleep.tasks.gsm_infinite.graph import Graph, Operand
from lmsleep.tasks.gsm_infinite.structure import Parameter, Structure
from lmsleep.tasks.gsm_infinite.templates import Names

MOST = 4  # constants are 1 ... 4 (1 ... modulus - 1 if there is one)
LARGEST = 1000  # value, where there is no modulus


class Definition(NamedTuple):
    """`constant (+ or *) (sum or difference of operands)`; without operands the constant alone."""

    operands: tuple[Parameter, ...]
    constant: int | None = None
    times: bool = False
    difference: bool = False


NOTHING = Definition(())  # is stated of totals and of the unknown


class Linear(NamedTuple):
    """`slope * x + value`, where x is the unknown of a problem in reverse."""

    slope: int
    value: int


@dataclass(frozen=True)
class Core:
    """A problem: everything but its names and the noise around it.

    Attributes:
        structure: places and things.
        definitions: what is stated of each instance parameter; nothing of the unknown of a reverse problem.
        query: the parameter asked for.
        answer: its value.
        ops: operations.
        given: in a reverse problem, the parameter whose value is stated besides, and that value.
    """

    structure: Structure
    definitions: dict[Parameter, Definition]
    query: Parameter
    answer: int
    ops: int
    given: tuple[Parameter, int] | None = None

    def operands(self, p: Parameter) -> Sequence[Parameter]:
        """Return the parameters that a parameter is computed from."""
        if p.thing < 0:
            return self.structure.summands(p)
        return self.definitions[p].operands if p in self.definitions else ()

    @property
    def necessary(self) -> list[Parameter]:
        """The parameters that the answer depends on, behind the query (in reverse: the given value)."""
        found = [self.query if self.given is None else self.given[0]]
        for p in found:  # which grows
            found += [q for q in self.operands(p) if q not in found]
        return found

    def hash(self, names: Names) -> int:
        """Hash what the answer depends on, in these names: the same whatever stands around it.

        Of every necessary parameter it covers name, constant and operands; of the problem the parameter asked
        for and, in reverse, the value given. The order of statements and of summands does not count.
        """
        said = []
        for p in self.necessary:
            below = [names(q) for q in self.operands(p)]
            constant, times, difference = self.definitions.get(p, NOTHING)[1:]
            said.append((names(p), constant, times, difference, below if difference else sorted(below)))
        given = self.given and self.given[1]
        # crc32, not hash(): Python's differs from process to process, and this decides what is held out.
        return zlib.crc32(repr((names(self.query), given, sorted(said))).encode())


def draw_core(random: Random, graph: Graph, *, reverse: bool, modulus: int | None) -> Core | None:
    """Draw numbers for a graph; None if a value comes out of range or the unknown cannot be solved for."""
    most = MOST if modulus is None else modulus - 1
    definitions = {p: _define(random, operands, most) for p, operands in graph.operands.items()}
    unknown = None
    if reverse:
        unknown = next(
            (p for p in reversed(graph.order) if p.thing >= 0 and not definitions[p].operands), None
        )
        if unknown is None:
            return None
    values = _values(graph, definitions, unknown, modulus)
    if values is None:
        return None
    query = graph.order[-1]
    if unknown is None:
        return Core(graph.structure, definitions, query, values[query].value, graph.ops)
    slope = values[query].slope
    # With such a slope the unknown cannot be solved for.
    if slope == 0 or (modulus and math.gcd(slope, modulus) != 1):
        return None
    answer = definitions.pop(unknown).constant
    assert answer is not None
    value = slope * answer + values[query].value
    return Core(
        graph.structure,
        definitions,
        unknown,
        answer,
        graph.ops,
        (query, value % modulus if modulus else value),
    )


def _define(random: Random, operands: list[Operand], most: int) -> Definition:
    """Draw a meaning of these operands."""
    rest = tuple(p for p in operands if p is not None)
    return draw_form(random, len(rest), len(rest) < len(operands), most)._replace(operands=rest)


def draw_form(random: Random, operands: int, constant: bool, most: int) -> Definition:
    """Draw what becomes of so many operands (and a constant); each alternative is as likely as the other."""
    number, times = None, False
    if not operands:
        # As below, where half of the constants (those that multiply) begin at 2.
        number = random.randint(1 + (random.random() < 0.5), most)
    elif constant:
        times = random.random() < 0.5
        number = random.randint(1 + times, most)
    return Definition((), number, times, operands == 2 and random.random() < 0.5)


def _values(
    graph: Graph, definitions: dict[Parameter, Definition], unknown: Parameter | None, modulus: int | None
) -> dict[Parameter, Linear] | None:
    """Compute the necessary parameters; None if one is out of range or not linear in the unknown."""
    values: dict[Parameter, Linear] = {}
    x = 0
    for p in graph.order:
        if p == unknown:
            x = definitions[p].constant or 0
            values[p] = Linear(1, 0)
            continue
        value = _total(graph, p, values) if p.thing < 0 else _evaluate(definitions[p], values)
        if value is None:
            return None
        if modulus is not None:
            value = Linear(value.slope % modulus, value.value % modulus)
        elif not (p.kind == "count") <= value.slope * x + value.value <= LARGEST:
            return None
        values[p] = value
    return values


def _total(graph: Graph, total: Parameter, values: dict[Parameter, Linear]) -> Linear | None:
    summands = [values[p] for p in graph.structure.summands(total)]
    if total.kind == "attributes":
        pairs = zip(summands[::2], summands[1::2], strict=True)
        products = [_product(count, average) for count, average in pairs]
        if None in products:
            return None
        summands = [p for p in products if p is not None]
    return Linear(sum(v.slope for v in summands), sum(v.value for v in summands))


def _product(a: Linear, b: Linear) -> Linear | None:
    # A square of the unknown would have to be solved, which is another task.
    if a.slope and b.slope:
        return None
    return Linear(a.slope * b.value + b.slope * a.value, a.value * b.value)


def _evaluate(definition: Definition, values: dict[Parameter, Linear]) -> Linear:
    operands, constant, times, difference = definition
    if not operands:
        return Linear(0, constant or 0)
    signs = (1, -1) if difference else (1,) * len(operands)
    slope = sum(sign * values[p].slope for sign, p in zip(signs, operands, strict=True))
    value = sum(sign * values[p].value for sign, p in zip(signs, operands, strict=True))
    if constant is None:
        return Linear(slope, value)
    return Linear(constant * slope, constant * value) if times else Linear(slope, constant + value)
