"""`lmsleep ask`: a question to a memory, which it does not change."""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tyro.conf import Positional

from lmsleep.cli.opening import SleepOptions, open_session
from lmsleep.cli.options import parse
from lmsleep.plain import to_json
from lmsleep.session import Session
from lmsleep.text.tokenizers import Spelled


@dataclass(frozen=True, kw_only=True)
class WriteOptions:
    """How an answer is written."""

    max_new_tokens: int | None = None
    """Longest answer; default 64, and 1 in the vocabulary of a task."""
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities sum to p."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer, as the ends of a text that the model knows do."""
    seed: int = 0
    """Of the draws."""

    def longest(self, session: Session) -> int:
        """Return the number of tokens of the longest answer."""
        if self.max_new_tokens is None:
            return 1 if isinstance(session.tokenizer, Spelled) else 64
        return self.max_new_tokens


@dataclass(frozen=True, kw_only=True)
class AskOptions(WriteOptions, SleepOptions):
    """Ask a memory something: a fork of it reads the question and answers, one forward pass a token."""

    model: Positional[Path]
    """A run, saved model, Hugging Face folder, adapter, GGUF file, or a shipped model: depo-N1, depo-N4."""
    question: Positional[str]
    """Text, or a task's own words (HOP_2 n1)."""
    memory: Path
    """Memory file; it is not changed."""
    json: bool = False
    """Print one JSON document instead of text."""


def ask(argv: list[str]) -> None:
    """Run `lmsleep ask MODEL QUESTION --memory MEMORY`."""
    options = parse(AskOptions, argv, "lmsleep ask")
    session = open_session(options.model, options, options.memory).fork()
    # The session is a fork of what the file holds and is never saved: the file stays as it is.
    answer = session.generate(
        options.question,
        options.longest(session),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=options.stop,
        seed=options.seed,
    )
    if options.json:
        document = {"question": options.question, "answer": answer, "stats": asdict(session.stats)}
        sys.stdout.write(to_json(document) + "\n")
    else:
        sys.stdout.write(f"{answer}\n")
