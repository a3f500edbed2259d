"""What sleep does to a model that was never trained with it: text after eviction, and planted facts."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from lmsleep.evaluation.intervals import wilson
from lmsleep.sleep import Backbone, SleepConfig, sleep_forward
from lmsleep.text.tokenizers import Tokenizer, check_tokens

KEPT, DROPPED = "nothing is evicted", "memory is dropped too"
FACTS, CHOICES = 4, 8  # facts in a context, and numbers to choose the answer from
PLACES = (
    "Aldermoor", "Brackwell", "Corvane", "Dunmere", "Elsworth", "Farrowby", "Gravenhill", "Hollowick",
    "Inverlay", "Jessamere", "Kettleby", "Larkdale", "Morrowfield", "Netherby", "Oakenshaw", "Pellworth",
)  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """The figures of one way of reading.

    Attributes:
        way: "N = 4" or another name, or one of the references `KEPT` (the whole text stays in attention) and
            `DROPPED` (the fast weights are evicted with the window).
        nats: mean negative log-likelihood of a token after an eviction.
        right: questions about planted facts whose right answer was the likeliest of `CHOICES`.
        questions: how many were asked.
        answer_nats: mean negative log-likelihood of the right answers.
    """

    way: str
    nats: float
    right: int
    questions: int
    answer_nats: float

    @property
    def perplexity(self) -> float:
        """The perplexity of a token of the text."""
        return math.exp(self.nats)

    @property
    def recall(self) -> tuple[float, float, float]:
        """The share of right answers with its 95 % interval (Wilson): (share, low, high)."""
        return self.right / self.questions, *wilson(self.right, self.questions)

    def to_dict(self) -> dict[str, str | float | list[float]]:
        """Return JSON-ready figures, with bits in place of nats."""
        share, low, high = self.recall
        return {
            "reading": self.way,
            "perplexity": self.perplexity,
            "bits_per_token": self.nats / math.log(2),
            "recall": share,
            "recall_interval": [low, high],
            "questions": self.questions,
            "bits_per_answer": self.answer_nats / math.log(2),
        }


def zero_shot(
    model: Backbone,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    sleep: SleepConfig,
    passes: Sequence[int],
    *,
    samples: int = 16,
    windows: int = 3,
    seed: int = 0,
    others: Mapping[str, SleepConfig] = MappingProxyType({}),
    progress: Callable[[str], None] = lambda way: None,
) -> Iterator[Reading]:
    """Read the same pieces of a text with each number of passes, and in the two reference ways.

    A piece is `windows` windows long, and begins with what the tokenizer puts before a text. Counted are its
    tokens from the second window on, the first of each window left out, which `DROPPED` could not predict.
    Then the same pieces are read with `FACTS` planted sentences in their first window, all is evicted, and a
    fork of the memory is asked for each fact: is the right number likelier than those of the other facts and
    as many that were not planted?

    Args:
        model: any `Backbone`.
        tokenizer: its tokenizer.
        tokens: the text; pieces begin at places drawn by `seed`.
        sleep: window, eviction and loop.
        passes: the N to read with.
        samples: pieces.
        windows: windows in a piece, at least 2.
        seed: of places, facts and numbers.
        others: sleeps with the same window, by the name of their reading, such as those that compact.
        progress: called with the way after each piece that was read in it.

    Returns:
        The readings, each made when it is asked for.

    Raises:
        ValueError: at once, for a window that is too short for the facts, a text that is too short for a
            piece, or tokens that the model does not know.
    """
    if sleep.window is None:
        raise ValueError(
            "window=None evicts nothing, so there is no sleep to try; give the tokens of a window"
        )
    if windows < 2 or samples < 1 or not (passes or others):
        raise ValueError(
            f"nothing to measure: windows={windows} (2 at least), samples={samples}, passes={passes}"
        )
    L = sleep.window
    generator = torch.Generator().manual_seed(seed)
    begin = torch.tensor([*tokenizer.begin], dtype=torch.int64)
    pieces = _pieces(begin, torch.as_tensor(tokens), L * windows, samples, generator)
    quizzes = [Quiz.draw(tokenizer, piece, L, generator) for piece in pieces]
    # Before anything is read: a tokenizer may know tokens that its model does not.
    for read in (torch.as_tensor(tokens), begin, *(quiz.tokens() for quiz in quizzes)):
        check_tokens(read, model.vocab_size, tokenizer)
    awake = replace(sleep, window=None)
    ways: dict[str, SleepConfig | None] = {KEPT: awake, DROPPED: None}
    ways |= {f"N = {n}": sleep.with_passes(n) for n in passes} | dict(others)
    return _readings(model, pieces, quizzes, L, ways, awake, progress)


@torch.no_grad()
def _readings(
    model: Backbone,
    pieces: list[Tensor],
    quizzes: list["Quiz"],
    L: int,
    ways: dict[str, SleepConfig | None],
    awake: SleepConfig,
    progress: Callable[[str], None],
) -> Iterator[Reading]:
    """Read the pieces, and ask the quizzes, in one way after the other."""
    for way, config in ways.items():
        nats, answered = [], []
        for piece, quiz in zip(pieces, quizzes, strict=True):
            nats.append(_nats(model, piece, L, config, awake))
            answered.append(quiz.answered(model, config, awake))
            progress(way)
        answers = torch.cat(answered)
        yield Reading(
            way=way,
            nats=sum(nats) / len(nats),
            right=int((answers[:, 0] > answers[:, 1:].amax(dim=1)).sum()),
            questions=len(answers),
            answer_nats=-float(answers[:, 0].mean()),
        )


def _pieces(
    begin: Tensor, tokens: Tensor, length: int, samples: int, generator: torch.Generator
) -> list[Tensor]:
    """Draw pieces `[length]`, each a stream of its own, which begins with `begin`."""
    length -= len(begin)
    if len(tokens) < length:
        raise ValueError(
            f"text has {len(tokens)} tokens, a piece needs {length}; take a longer text or fewer windows"
        )
    # Drawn before the facts, so that the pieces do not depend on how many facts there are.
    starts = torch.randint(len(tokens) - length + 1, (samples,), generator=generator)
    return [torch.cat([begin, tokens[a : a + length]]) for a in starts.tolist()]


def _nats(model: Backbone, piece: Tensor, L: int, sleep: SleepConfig | None, awake: SleepConfig) -> float:
    """Return the mean nats per counted token of the piece; with `sleep=None` every window is read alone."""
    counted = torch.ones_like(piece, dtype=torch.bool)
    # The first window has nothing before it; the first token of each has nothing to be predicted from in
    # DROPPED, so no way of reading may count it.
    counted[:L] = counted[::L] = False
    rows, mask = (piece[None], counted[None]) if sleep else (piece.view(-1, L)[1:], counted.view(-1, L)[1:])
    device = model.device
    loss = sleep_forward(
        model, rows.to(device), mask.to(device), sleep or awake, read_last=False, return_logits=False
    ).loss
    assert loss is not None
    return float(loss)


@dataclass(frozen=True)
class Quiz:
    """A piece of the text with planted facts, and a question about each.

    Attributes:
        context: `[T]`, the piece with the facts in its first window, as long as it was.
        questions: tokens of each question.
        choices: tokens of the possible answers to each, the right one first.
    """

    context: Tensor
    questions: list[list[int]]
    choices: list[list[list[int]]]

    @classmethod
    def draw(cls, tokenizer: Tokenizer, piece: Tensor, L: int, generator: torch.Generator) -> "Quiz":
        """Plant drawn facts in the first `L` tokens of a piece `[T]`, which begins with `tokenizer.begin`.

        Raises:
            ValueError: if L is too short for them.
        """
        # The order of draws (places, numbers, position) is fixed: seeds of published tables give these facts.
        places = [PLACES[i] for i in torch.randperm(len(PLACES), generator=generator)[:FACTS].tolist()]
        numbers = [str(n) for n in (1000 + torch.randperm(9000, generator=generator)[:CHOICES]).tolist()]
        planted = tokenizer.encode(
            "".join(f"\nThe code of {place} is {n}.\n" for place, n in zip(places, numbers, strict=False))
        )
        questions = [tokenizer.encode(f"\nThe code of {place} is") for place in places]
        answers = [tokenizer.encode(f" {n}") for n in numbers]
        longest = max(map(len, questions)) + max(map(len, answers))
        begin = len(tokenizer.begin)  # of the piece, before which nothing is planted
        if begin + len(planted) > L or longest > L:
            raise ValueError(
                f"window={L} is too short (give a longer one): the planted facts have {len(planted)} tokens, "
                f"a question with its answer {longest}"
            )
        # Planted anywhere in the first window, whole; what the piece gains in front it loses at its end.
        at = begin + int(torch.randint(L - begin - len(planted) + 1, (), generator=generator))
        context = torch.cat([piece[:at], torch.tensor(planted), piece[at:]])[: len(piece)]
        # The numbers of the other facts are among the choices: knowing that some number was read does not
        # help.
        choices = [[answers[i], *answers[:i], *answers[i + 1 :]] for i in range(FACTS)]
        return cls(context, questions, choices)

    def tokens(self) -> Tensor:
        """Return all tokens that are read of it, `[n]`."""
        asked = [*self.questions, *(choice for choices in self.choices for choice in choices)]
        return torch.cat([self.context, *map(torch.tensor, asked)])

    def answered(
        self, model: Backbone, sleep: SleepConfig | None, awake: SleepConfig | None = None
    ) -> Tensor:
        """Return log-likelihoods `[FACTS, CHOICES]` in nats, the right first.

        Without `sleep` nothing is read before, and the questions are read as `awake` says (in passes).
        """
        device = model.device
        state = model.initial_state(1)
        if sleep is not None:
            evict = sleep.window is not None
            state = sleep_forward(
                model, self.context[None].to(device), None, sleep, evict_last=evict, return_logits=False
            ).state
        rows = [
            (question, choice)
            for question, choices in zip(self.questions, self.choices, strict=True)
            for choice in choices
        ]
        lengths = torch.tensor([len(q) + len(c) for q, c in rows])
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(q + c) for q, c in rows], batch_first=True)
        logits = sleep_forward(
            model,
            padded.to(device),
            None,
            (sleep or awake or SleepConfig()).with_passes(1),
            # Every pair of a question and a choice forks the one memory.
            state=state.rows([0] * len(rows)),
            lengths=lengths.to(device),
        ).logits
        assert logits is not None
        # Logits at place t predict token t + 1; padding behind a row is cut off by `asked`.
        log_p = logits[:, :-1].float().log_softmax(-1).gather(2, padded[:, 1:, None].to(device))[..., 0].cpu()
        place = torch.arange(1, padded.shape[1])
        first = torch.tensor([len(q) for q, _ in rows])[:, None]
        asked = (place >= first) & (place < lengths[:, None])
        return (log_p * asked).sum(dim=1).view(FACTS, CHOICES)
