"""Let sessions read, sleep and write together."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lmsleep.session.answer import Piece
from lmsleep.session.owner import finish, proceed
from lmsleep.session.rows import Row
from lmsleep.session.sampling import Sampling
from lmsleep.session.session import Readable, Session


class SessionBatch:
    """Sessions of one model that read, sleep and write together, though their windows do not align.

    In every step rows that are due sleep together, and the others read on together without waiting. Each row
    comes out as if it were alone: exactly, but for the rounding of matrix products of another shape.

    Args:
        sessions: one a row; they stay usable on their own.

    Raises:
        ValueError: if there is none, one twice, or they differ in model or sleep.
    """

    def __init__(self, sessions: Iterable[Session]) -> None:
        self.sessions = list(sessions)
        if not self.sessions:
            raise ValueError("sessions must be at least one")
        # Two rows of one session would both claim to be its stream after a step.
        if len({id(s) for s in self.sessions}) < len(self.sessions):
            raise ValueError("sessions must not hold one twice; fork it")
        first = self.sessions[0]
        # The very same model: equal weights in two objects cannot share a pass.
        if any(s.model is not first.model or s.sleep_config != first.sleep_config for s in self.sessions):
            raise ValueError("sessions must have the same model and the same sleep")
        self.model, self.sleep_config = first.model, first.sleep_config

    def read(self, texts: Sequence[Readable]) -> None:
        """Read a text on each row; an empty one leaves its row as it is.

        Raises:
            ValueError: as `Session.read`, before anything is read.
            BrokenSleep: if a sleep of some row left NaN or infinity; the other rows have read all of theirs.
        """
        # All texts are tokens, checked, before the first of them is read.
        finish(self.sessions, [Row(stream=s.stream, unread=s.tokens(text)) for s, text in self._each(texts)])

    def read_with_logits(self, texts: Sequence[Readable]) -> list[Tensor]:
        """Read a text on each row, as `read` does, and return the logits `[t, V]` after its t tokens.

        Raises:
            ValueError: as `read`.
            BrokenSleep: as `read`.
        """
        rows = [
            Row(stream=s.stream, unread=s.tokens(text), keep_logits=True) for s, text in self._each(texts)
        ]
        seen: list[list[Tensor]] = [[] for _ in rows]
        for stepped in proceed(self.sessions, rows):
            for found, row in zip(seen, stepped, strict=True):
                if row.logits is not None:  # rows that are done step along without any
                    found.append(row.logits)
        nothing = torch.empty(0, self.model.vocab_size)
        return [torch.cat(found) if found else nothing for found in seen]

    def sleep(self, passes: int | None = None) -> None:
        """Sleep now on all open windows, together; see `Session.sleep`."""
        finish(self.sessions, [s.napping(passes) for s in self.sessions])

    def rewind(self) -> None:
        """Take back the last call of this batch on all rows, those included that it left as they were.

        It is `Session.rewind` on each, so it takes back something else where a row was used alone since.

        Raises:
            ValueError: as `Session.rewind`, before anything is taken back.
        """
        for session in sorted(self.sessions, key=lambda s: len(s.past)):  # one without a past raises first
            session.rewind()

    def generate(
        self,
        prompts: Sequence[Readable],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop: Sequence[Piece] = (),
        seeds: Sequence[int] | None = None,
    ) -> list[str | list[int]]:
        """Read a prompt on each row, then write on all of them; see `Session.generate`.

        `seeds` has one for each row (default 0): a row is drawn as it would be alone. A row whose answer has
        ended waits for nobody and is not changed any more.
        """
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
        seeds = [0] * len(self.sessions) if seeds is None else seeds
        if len(seeds) != len(self.sessions):
            raise ValueError(f"seeds must be {len(self.sessions)}, one a session, got {len(seeds)}")
        rows = finish(
            self.sessions,
            [
                session.written(prompt, max_new_tokens, sampling, stop, seed)
                for (session, prompt), seed in zip(self._each(prompts), seeds, strict=True)
            ],
        )
        return [row.answer.whole() for row in rows]

    def _each(self, texts: Sequence[Readable]) -> list[tuple[Session, Readable]]:
        if len(texts) != len(self.sessions):
            raise ValueError(f"texts must be {len(self.sessions)}, one a session, got {len(texts)}")
        return [*zip(self.sessions, texts, strict=True)]
