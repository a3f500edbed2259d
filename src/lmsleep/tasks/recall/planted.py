"""Facts in prose: who has what, lives where and is whose friend, and what is asked about it."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import NamedTuple
from zlib import crc32

from lmsleep.tasks.recall.filler import filler
from lmsleep.tasks.recall.story import Question, Story
from lmsleep.tasks.recall.words import CITIES, COLORS, JOBS, NAMES, THINGS
from lmsleep.text import Split

HELD_OUT = 8  # one combination of name and value in 8 is for testing, and so is one name in 8
SLOTS = {
    "name": "[A-Z][a-z]+", "thing": "[a-z]+", "value": r"\w+", "a": "an?",
}  # fmt: skip
TOLD = ("as trained", "names", "wordings", "filler")  # how a test differs from training


@dataclass(frozen=True)
class Relation:
    """Something that is told of a person, and asked.

    `{name}`, `{thing}`, `{value}` and `{a}`, the article of the value, stand for what is drawn.
    """

    name: str
    values: tuple[str, ...]
    trained: tuple[str, ...]
    """Wordings of training."""
    unseen: tuple[str, ...]
    """Wordings of the test alone."""
    questions: tuple[str, ...]
    """What stands before the value."""
    of_friend: str = ""
    """The question about a friend of `{name}`; empty for what is asked of none."""

    @cached_property
    def told(self) -> list[re.Pattern[str]]:
        """What a sentence that tells it looks like."""
        return [_pattern(wording) for wording in (*self.trained, *self.unseen)]

    @cached_property
    def asked(self) -> list[re.Pattern[str]]:
        """What a question for it looks like."""
        return [_pattern(question) for question in self.questions]

    @cached_property
    def asked_of_friend(self) -> re.Pattern[str] | None:
        """What the question for that of a friend looks like."""
        return _pattern(self.of_friend) if self.of_friend else None


def _pattern(wording: str) -> re.Pattern[str]:
    """Return a pattern of a whole wording, with a group for each slot; what occurs twice must be the same."""
    seen: set[str] = set()

    def slot(found: re.Match[str]) -> str:
        name = found[1]
        if name == "a":
            return SLOTS[name]
        again = name in seen
        seen.add(name)
        return f"(?P={name})" if again else f"(?P<{name}>{SLOTS[name]})"

    return re.compile(re.sub(r"\\{(\w+)\\}", slot, re.escape(wording)))


RELATIONS = {
    relation.name: relation
    for relation in (
        Relation(
            "color",
            COLORS,
            (
                "{name} has {a} {value} {thing}.",
                "{name} owns {a} {value} {thing}.",
                "{name}'s {thing} is {value}.",
                "The {thing} of {name} is {value}.",
            ),
            ("{name} bought {a} {value} {thing}.", "{name} came with {a} {value} {thing}."),
            (
                "What color is {name}'s {thing}? It is",
                "What is the color of the {thing} of {name}? The {thing} is",
            ),
            "What color is the {thing} of {name}'s friend? It is",
        ),
        Relation(
            "place",
            CITIES,
            (
                "{name} lives in {value}.",
                "{name} has a house in {value}.",
                "{name}'s home is in {value}.",
                "{value} is where {name} lives.",
            ),
            ("{name} moved to {value}.", "{name} settled in {value}."),
            ("Where does {name} live? {name} lives in", "In which city is {name}'s home? It is in"),
            "Where does {name}'s friend live? The friend lives in",
        ),
        Relation(
            "job",
            JOBS,
            (
                "{name} works as {a} {value}.",
                "{name} is {a} {value}.",
                "{name}'s job is that of {a} {value}.",
                "The {value} is called {name}.",
            ),
            ("{name} earns a living as {a} {value}.", "{name} found work as {a} {value}."),
            ("What is {name}'s job? {name} is a", "What does {name} work as? {name} works as a"),
            "What is the job of {name}'s friend? The friend is a",
        ),
        Relation(
            "age",
            tuple(map(str, range(11, 100))),
            (
                "{name} is {value} years old.",
                "{name} is {value}.",
                "{name}'s age is {value}.",
                "{name} turned {value} this year.",
            ),
            ("{name} had {value} candles on the cake.", "At {value}, {name} has seen a lot."),
            ("How old is {name}? {name} is", "What is {name}'s age? It is"),
            "How old is {name}'s friend? The friend is",
        ),
        Relation(
            "code",
            tuple(map(str, range(1000, 10000))),
            (
                "The code of {name} is {value}.",
                "{name}'s code is {value}.",
                "{name} chose the code {value}.",
                "{name} uses {value} as a code.",
            ),
            ("{name} was given the code {value}.", "{value} is the code that opens {name}'s door."),
            ("What is {name}'s code? It is", "Which code does {name} use? {name} uses"),
            "What is the code of {name}'s friend? It is",
        ),
        Relation(
            "friend",
            NAMES,
            (
                "{name} is a friend of {value}.",
                "{name}'s friend is {value}.",
                "{name} has a friend called {value}.",
                "{name} and {value} are friends.",
            ),
            ("{name} made friends with {value}.", "{name} has known {value} since school."),
            ("Who is {name}'s friend? It is", "What is the name of {name}'s friend? It is"),
        ),
    )
}
HOP = "hop"  # the kind of question about a friend
HOPS = [name for name, relation in RELATIONS.items() if relation.of_friend]


def label(kind: str, told: str) -> str:
    """Return the name of a kind of question, told as training tells it or otherwise."""
    return kind if told == TOLD[0] else f"{kind}+{told}"


class Fact(NamedTuple):
    """That a relation holds between a person (and a thing, if it is about one) and a value."""

    relation: Relation
    name: str
    thing: str
    value: str

    def tell(self, wording: str) -> str:
        """Put it into a wording or a question."""
        article = "an" if self.value[0] in "aeiou" else "a"
        return wording.format(name=self.name, thing=self.thing, value=self.value, a=article)


def _held_out(*words: str) -> bool:
    return crc32(" ".join(words).encode()) % HELD_OUT == 0


TRAINED_NAMES = [name for name in NAMES if not _held_out("name", name)]
UNSEEN_NAMES = [name for name in NAMES if _held_out("name", name)]


class Teller:
    """Draws stories of a split, told as in training or otherwise.

    Args:
        random: source of the draws.
        split: train or test. The test has combinations of name and value that training never has.
        told: of `TOLD`, as training for the train split: names that training never has, or wordings that it
            never has. ("filler" is up to who says how much of it there is.)
    """

    def __init__(self, random: Random, split: Split, told: str) -> None:
        self._random, self._split, self._told = random, split, told
        self._names = UNSEEN_NAMES if told == "names" else TRAINED_NAMES

    def facts(self, number: int, fill: int) -> Story:
        """Tell a number of facts, of one relation or of two; each is asked."""
        r = self._random
        relations = r.sample([*RELATIONS.values()], r.randint(1, 2))
        facts = self._draw([r.choice(relations) for _ in range(number)])
        count = Counter(fact.relation.name for fact in facts)
        questions = [
            Question(f.relation.name, f.tell(r.choice(f.relation.questions)), f.value, count[f.relation.name])
            for f in facts
        ]
        return self._story(facts, questions, fill)

    def hops(self, number: int, fill: int) -> Story:
        """Tell a fact of each of `number` people and whose friends these are; ask for the friend's."""
        r = self._random
        relation = RELATIONS[r.choice(HOPS)]
        facts = self._draw([relation] * number, twice=False)
        people = {fact.name for fact in facts}
        friends, questions = [], []
        for fact in facts:
            names = self._names_for(fact.name, people)
            if not names:
                return self.hops(number, fill)
            name = r.choice(names)
            people.add(name)
            friends.append(Fact(RELATIONS["friend"], name, "", fact.name))
            asked = fact._replace(name=name).tell(relation.of_friend)
            questions.append(Question(HOP, asked, fact.value, number))
        return self._story(facts + friends, questions, fill)

    def _draw(self, relations: Sequence[Relation], *, twice: bool = True) -> list[Fact]:
        """Draw a fact of each relation; values differ within a relation, and a person may have two facts."""
        r = self._random
        # Where all have the same thing, names alone tell facts apart.
        things = [r.choice(THINGS)] if r.random() < 0.5 else THINGS
        facts: list[Fact] = []
        for relation in relations:
            thing = r.choice(things) if relation.name == "color" else ""
            # Nobody is told of and somebody's friend: friendship goes both ways.
            told = {fact.name for fact in facts}
            friends = {fact.value for fact in facts if fact.relation.name == "friend"}
            names: list[str] = []
            while not names:
                value = r.choice(self._names if relation.name == "friend" else relation.values)
                if value in told or any(fact.value == value for fact in facts):
                    continue
                has = {fact.name for fact in facts if (fact.relation, fact.thing) == (relation, thing)}
                again = [name for name in sorted(told - has) if self._fits(name, value)]
                if twice and again and r.random() < 0.5:
                    names = again
                else:
                    names = self._names_for(value, told | friends)
            facts.append(Fact(relation, r.choice(names), thing, value))
        return facts

    def _names_for(self, value: str, others: Collection[str]) -> list[str]:
        """Return the names of whom that value may be told, but for those of others."""
        return [n for n in self._names if n != value and n not in others and self._fits(n, value)]

    def _fits(self, name: str, value: str) -> bool:
        """Return whether a combination belongs to the split; those of names never trained on always do."""
        return self._told == "names" or _held_out(name, value) == (self._split == "test")

    def _story(self, facts: list[Fact], questions: list[Question], fill: int) -> Story:
        r = self._random
        unseen = self._told == "wordings"
        told = [f.tell(r.choice(f.relation.unseen if unseen else f.relation.trained)) for f in facts]
        sentences = [*told, *filler(r, fill)]
        r.shuffle(sentences)
        r.shuffle(questions)
        return Story(" ".join(sentences), questions)


def solve(text: str, question: str) -> str:
    """Answer a question from a text.

    Raises:
        ValueError: for what is no question of ours, or a text that does not tell.
    """
    sentences = [sentence.strip() for sentence in re.findall(r"[^.]+\.", text)]
    for relation in RELATIONS.values():
        for pattern in relation.asked:
            if found := pattern.fullmatch(question):
                return _look_up(sentences, relation, found.groupdict())
        if relation.asked_of_friend and (found := relation.asked_of_friend.fullmatch(question)):
            friend = _look_up(sentences, RELATIONS["friend"], {"name": found["name"]})
            return _look_up(sentences, relation, {**found.groupdict(), "name": friend})
    raise ValueError(f"{question!r} asks for nothing that is known")


def _look_up(sentences: Iterable[str], relation: Relation, wanted: dict[str, str]) -> str:
    """Return the value that a relation has, for the name (and thing) wanted."""
    for sentence in sentences:
        for pattern in relation.told:
            found = pattern.fullmatch(sentence)
            if found is None or found["value"] not in relation.values:
                continue
            if all(found[slot] == word for slot, word in wanted.items()):
                return found["value"]
    raise ValueError(f"the text does not tell the {relation.name} of {wanted}")
