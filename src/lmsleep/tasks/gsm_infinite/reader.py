"""A reader that solves a problem from its text, knowing nothing of what made it but the templates' words.

It resolves on demand from the question, so what is irrelevant may be circular or left open.
"""

import re
from dataclasses import dataclass, field
from functools import cache

from lmsleep.tasks.gsm_infinite.templates import TEMPLATES, Template

Linear = tuple[int, int]  # slope of the unknown, value


class UnsolvableError(ValueError):
    """The text does not determine an answer."""


@dataclass(frozen=True)
class Statement:
    """`constant (+ or *) (sum or difference of names)`; a name that is merely positive has no statement."""

    constant: int | None
    times: bool
    difference: bool
    names: tuple[str, ...]


@dataclass
class Problem:
    """A problem as a text tells it.

    Attributes:
        statements: of each name, in order of appearance.
        positive: names of which no more is known.
        mentioned: for each place, the kinds of things of which a count or an average is mentioned there.
        asked: the name in question.
        modulus: of the arithmetic, if the question names one.
    """

    template: Template
    statements: dict[str, list[Statement]] = field(default_factory=dict)
    positive: set[str] = field(default_factory=set)
    mentioned: dict[str, set[str]] = field(default_factory=dict)
    asked: str = ""
    modulus: int | None = None


def answer(text: str) -> int:
    """Answer the question in a text.

    Raises:
        UnsolvableError: if it is no problem in one of the templates, or has no unique answer.
    """
    problem = read(text)
    if problem.asked not in problem.positive:
        slope, value = _resolve(problem, problem.asked, {})
        if slope:
            raise UnsolvableError(f"{problem.asked!r} has no value")
        return value % problem.modulus if problem.modulus else value
    known: dict[str, Linear | None] = {problem.asked: (1, 0)}
    left, right = _equation(problem, known)
    slope, value = left[0] - right[0], right[1] - left[1]
    if problem.modulus:
        # The inverse of the slope in the arithmetic of the modulus.
        return value * pow(slope, -1, problem.modulus) % problem.modulus
    if not slope or value % slope:
        raise UnsolvableError(f"{problem.asked!r} is not determined")
    return value // slope


def read(text: str) -> Problem:
    """Parse a text.

    Raises:
        UnsolvableError: if a sentence is in none of the templates' forms.
    """
    text = re.sub(r"\s+([.,?])", r"\1", " ".join(text.split())).casefold()
    template = next((t for t in TEMPLATES.values() if _is_in(t, text)), None)
    if template is None:
        raise UnsolvableError("the text is in none of the templates")
    problem = Problem(template)
    text = text.replace(template.instruction.casefold(), "")
    for sentence in re.findall(r"[^.?]+[.?]", text):
        _read_sentence(problem, sentence.strip())
    if not problem.asked:
        raise UnsolvableError("the text asks nothing")
    for name in [problem.asked, *problem.positive, *problem.statements]:
        _mention(problem, name)
    for statements in problem.statements.values():
        for name in (name for statement in statements for name in statement.names):
            _mention(problem, name)
    return problem


def _is_in(template: Template, text: str) -> bool:
    """Return True if the text counts things of the template, or averages over them."""
    return any(f" {plural} in" in text or f" {plural} are" in text or f" per {one} in" in text
               for group in template.things for one, plural in group)  # fmt: skip


def _read_sentence(problem: Problem, sentence: str) -> None:
    body, equals = sentence[:-1], f" {problem.template.equals} "
    if sentence.endswith("?"):
        body, _, modulus = body.partition(", modulo ")
        problem.modulus = int(modulus) if modulus else None
        counted = re.fullmatch(r"how many (.+) are there in (.+)", body)
        problem.asked = (
            f"the number of {counted[1]} in {counted[2]}" if counted else body.removeprefix("what is ")
        )
    elif body.endswith(" is positive"):
        problem.positive.add(body.removesuffix(" is positive"))
    elif equals in body:
        name, _, value = body.partition(equals)
        problem.statements.setdefault(name, []).append(_read_value(problem.template, value))
    else:
        raise UnsolvableError(f"not a sentence of a problem: {sentence!r}")


def _read_value(template: Template, value: str) -> Statement:
    constant, times = None, False
    if number := re.match(rf"(\d[\d ]*)(?: ({template.times}|{template.more}) |$)", value):
        constant, times = int(number[1].replace(" ", "")), number[2] == template.times
        value = value[number.end() :]
    difference = value.startswith(template.difference)
    for opening in (template.difference, "the sum of"):
        value = value.removeprefix(f"{opening} ")
    return Statement(constant, times, difference, tuple(re.split(r", | and ", value)) if value else ())


def _parse(template: Template, name: str) -> tuple[str, str, str]:
    """Parse a name into kind, thing (in the plural, empty for totals) and place."""
    for kind, what in (("total", template.category), ("attributes", template.attribute)):
        if found := re.fullmatch(rf"the total number of {what} in (.+)", name):
            return kind, "", found[1]
    if found := re.fullmatch(rf"the average number of {template.attribute} per (.+) in (.+)", name):
        return "average", _plurals(template)[found[1]], found[2]
    if found := re.fullmatch(r"the number of (.+) in (.+)", name):
        return "count", found[1], found[2]
    raise UnsolvableError(f"{name!r} is no name of a parameter")


@cache
def _plurals(template: Template) -> dict[str, str]:
    """Return the plural of each thing."""
    things = [thing for group in (*template.things, *template.all_noise_things) for thing in group]
    return {one.casefold(): many.casefold() for one, many in things}


@cache
def _singulars(template: Template) -> dict[str, str]:
    return {many: one for one, many in _plurals(template).items()}


def _mention(problem: Problem, name: str) -> None:
    _, thing, place = _parse(problem.template, name)
    if thing:
        problem.mentioned.setdefault(place, set()).add(thing)


def _equation(problem: Problem, known: dict[str, Linear | None]) -> tuple[Linear, Linear]:
    """Return the two sides of what is said twice: by two statements, or by a total and its value."""
    for name, statements in problem.statements.items():
        total = _parse(problem.template, name)[0] in ("total", "attributes")
        if total:
            return _resolve(problem, name, known), _evaluate(problem, statements[0], known)
        if len(statements) == 2:
            left, right = (_evaluate(problem, statement, known) for statement in statements)
            return left, right
        if name == problem.asked:
            return (1, 0), _evaluate(problem, statements[0], known)
    raise UnsolvableError("nothing is said that would determine the unknown")


def _resolve(problem: Problem, name: str, known: dict[str, Linear | None]) -> Linear:
    """Compute the value of a name; `known` collects values, with None for those on the way."""
    if name in known:
        value = known[name]
        if value is None:
            raise UnsolvableError(f"{name!r} depends on itself")
        return value
    # A name that is met again before it has a value depends on itself.
    known[name] = None
    kind, _, place = _parse(problem.template, name)
    if kind in ("total", "attributes"):
        value = _total(problem, kind, place, known)
    elif len(problem.statements.get(name, ())) != 1:
        raise UnsolvableError(f"{name!r} is not defined exactly once")
    else:
        value = _evaluate(problem, problem.statements[name][0], known)
    known[name] = value
    return value


def _total(problem: Problem, kind: str, place: str, known: dict[str, Linear | None]) -> Linear:
    one = _singulars(problem.template)
    slope, value = 0, 0
    for thing in problem.mentioned.get(place, ()):
        a, b = _resolve(problem, f"the number of {thing} in {place}", known)
        if kind == "attributes":
            per = f"the average number of {problem.template.attribute} per {one[thing]} in {place}"
            c, d = _resolve(problem, per, known)
            if a and c:
                raise UnsolvableError("not linear in the unknown")
            a, b = a * d + c * b, b * d
        slope, value = slope + a, value + b
    return slope, value


def _evaluate(problem: Problem, statement: Statement, known: dict[str, Linear | None]) -> Linear:
    values = [_resolve(problem, name, known) for name in statement.names]
    sign = -1 if statement.difference else 1
    slope = sum((sign if i else 1) * v[0] for i, v in enumerate(values))
    value = sum((sign if i else 1) * v[1] for i, v in enumerate(values))
    if statement.constant is None:
        return slope, value
    if statement.times:
        return statement.constant * slope, statement.constant * value
    return slope, statement.constant + value
