"""A problem in words and tokens: phrases are encoded once, statements are put together from them.

The text is by definition the pieces one after the other, each beginning with its space, so joining their
tokens is exact for every tokenizer.
"""

from collections.abc import Sequence
from functools import cache

from lmsleep.tasks.gsm_infinite.meaning import LARGEST, Definition
from lmsleep.tasks.gsm_infinite.structure import Kind
from lmsleep.tasks.gsm_infinite.templates import TEMPLATES, Template, Thing
from lmsleep.text.tokenizers import Tokenizer, Words, load_tokenizer

Tokens = list[int]


class Language:
    """Phrases of a template as tokens of a tokenizer."""

    def __init__(self, template: Template, tokenizer: Tokenizer) -> None:
        self.template = template
        self._encode = cache(tokenizer.encode)
        t = template
        self._heads: dict[tuple[Kind, bool], Tokens] = {}
        for capital in (False, True):
            the = " The" if capital else " the"
            self._heads["count", capital] = self.piece(f"{the} number of")
            self._heads["average", capital] = self.piece(f"{the} average number of {t.attribute} per")
            self._heads["total", capital] = self.piece(f"{the} total number of {t.category}")
            self._heads["attributes", capital] = self.piece(f"{the} total number of {t.attribute}")
        self._at, self._stop, self._and, self._comma = map(self.piece, (" in", ".", " and", ","))
        self._equals = self.piece(f" {t.equals}")
        self._constant = [self.piece(f" {word}") for word in (t.more, t.times)]
        self._several = [self.piece(f" {words}") for words in ("the sum of", t.difference)]

    def piece(self, text: str) -> Tokens:
        """Encode a phrase."""
        return self._encode(text)

    def name(self, kind: Kind, place: str, thing: Thing | None = None, *, capital: bool = False) -> Tokens:
        """Encode the name of a parameter, at the beginning of a sentence or within."""
        name = self._heads[kind, capital]
        if thing is not None:
            name = name + self._encode(" " + thing[kind == "count"])
        return name + self._at + self._encode(" " + place)

    def statement(self, subject: Tokens, definition: Definition, operands: Sequence[Tokens]) -> Tokens:
        """Encode a sentence that defines a parameter."""
        value = subject + self._equals
        if definition.constant is not None:
            value = value + self.piece(f" {definition.constant}")
            if operands:
                value = value + self._constant[definition.times]
        if len(operands) > 1:
            value = value + self._several[definition.difference]
        for i, operand in enumerate(operands):
            between = [] if i == 0 else self._and if i == len(operands) - 1 else self._comma
            value = value + between + operand
        return value + self._stop

    def value(self, subject: Tokens, value: int) -> Tokens:
        """Encode a sentence that gives away the value of a parameter."""
        return subject + self._equals + self.piece(f" {value}") + self._stop

    def unknown(self, subject: Tokens) -> Tokens:
        """Encode a sentence that says of a parameter no more than that there is one."""
        return subject + self.piece(" is positive.")

    def question(self, kind: Kind, place: str, thing: Thing | None, modulus: int | None) -> Tokens:
        """Encode the question."""
        if kind == "count":
            assert thing is not None
            asked = self.piece(" How many") + self._encode(" " + thing[1]) + self.piece(" are there in")
            asked = asked + self._encode(" " + place)
        else:
            asked = self.piece(" What is") + self.name(kind, place, thing)
        return asked + (self.piece(f", modulo {modulus}?") if modulus else self.piece("?"))

    @property
    def instruction(self) -> Tokens:
        """The tokens of what every problem of the template presupposes."""
        return self.piece(" " + self.template.instruction)

    def longest_name(self, *, noise: bool) -> int:
        """The number of tokens of the longest name of a parameter, in the core or in the noise."""
        t = self.template
        places = t.all_noise_places if noise else [p for group in t.places for p in group]
        groups = t.all_noise_things if noise else t.things
        heads = max(map(len, self._heads.values()))
        thing = max(len(self._encode(" " + word)) for group in groups for thing in group for word in thing)
        return heads + thing + len(self._at) + max(len(self._encode(" " + place)) for place in places)

    def longest_noise(self, most: int | None) -> int:
        """An upper bound of the number of tokens of a sentence of noise, with numbers up to `most` if any."""
        verb = len(self._equals) + max(map(len, self._several))
        if most is not None:
            verb += len(self.piece(f" {most}")) + max(map(len, self._constant))
        operands = 2 * max(self.longest_name(noise=False), self.longest_name(noise=True))
        return self.longest_name(noise=True) + verb + operands + len(self._and) + len(self._stop)

    @property
    def longest_question(self) -> int:
        """An upper bound of the number of tokens of a question."""
        asked = len(self.piece(" How many")) + len(self.piece(" are there in")) + len(self.piece(" What is"))
        return asked + self.longest_name(noise=False) + len(self.piece(f", modulo {LARGEST}?"))


@cache
def tokenizer(name: str) -> Tokenizer:
    """Load `"words"`, with a token for each word of the templates, or what `load_tokenizer` knows."""
    if name == "words":
        return Words(WORDS)
    try:
        return load_tokenizer(name)
    except ValueError as error:
        raise ValueError(f"{error} (or use 'words')") from None


@cache
def language(template: str, name: str) -> Language:
    """Return the language of a template in the tokenizer of that name."""
    return Language(TEMPLATES[template], tokenizer(name))


def _vocabulary() -> set[str]:
    """Return every word that a template can need."""
    text = ["The the number of average per total in . and , sum is positive How many are there What modulo ?"]
    text += map(str, range(10))
    for t in TEMPLATES.values():
        text += [t.category, t.attribute, t.equals, t.more, t.times, t.difference, t.instruction]
        text += [place for group in (*t.places, t.all_noise_places) for place in group]
        text += [word for group in (*t.things, *t.all_noise_things) for thing in group for word in thing]
    return {word for part in text for word in Words.PIECES.findall(part)}


WORDS = sorted(_vocabulary())
