"""Sessions: unbounded streams with bounded memory, one (`Session`) or many together (`SessionBatch`)."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self, overload

import torch
from torch import Tensor

from lmsleep.memory import model_identity
from lmsleep.session import saving, stream
from lmsleep.session.answer import Answer, Piece
from lmsleep.session.sampling import Sampling
from lmsleep.session.stream import Step, Stream
from lmsleep.sleep import Backbone, SleepConfig
from lmsleep.state import Cache, Memory, Origin, State, Storage
from lmsleep.text.tokenizers import Tokenizer

Readable = str | Sequence[int] | Tensor


class BrokenSleep(RuntimeError):
    """A sleep left NaN or infinity; the memory before it was kept, the tokens of its window are not read."""


@dataclass(frozen=True)
class Stats:
    """What a session has done and what it holds."""

    tokens: int
    """Tokens read."""
    sleeps: int
    """Sleeps."""
    window_tokens: int
    """Tokens in the open window."""
    seconds_awake: float
    """Time in ordinary passes; what a batch reads together counts for each of its rows."""
    seconds_asleep: float
    """Time in windows that were slept on: all N passes."""
    working_bytes: int
    """Keys and values and tails of convolutions, now."""
    memory_bytes: int
    """Fast weights."""
    permanent_bytes: int
    """Slow weights."""
    peak_bytes: int
    """Most bytes of working memory and fast weights so far."""


class Session:
    """A stream that is read, slept on, asked and saved, on any `Backbone`.

    Three layers of memory: `working` (keys and values of the open window), `memory` (fast weights: what
    sleep consolidated and the window wrote since), `permanent` (slow weights, never changed). The open
    window sleeps when it is full and the stream goes on, or when `sleep()` is called.

    Args:
        model: any `Backbone`; its slow weights must not change while the session lives.
        sleep: window and passes. Looped wake passes are refused: they cannot read token by token.
        tokenizer: for reading and writing text; None: tokens only.
        memory: one row of fast weights to begin with; default `S = 0`.

    Raises:
        ValueError: for a memory that does not fit the model, or more than one wake pass.
    """

    def __init__(
        self,
        model: Backbone,
        sleep: SleepConfig,
        tokenizer: Tokenizer | None = None,
        *,
        memory: Memory | None = None,
    ) -> None:
        if sleep.wake_passes != 1:
            raise ValueError(f"wake_passes={sleep.wake_passes}: a session reads in one wake pass only")
        self.model, self.sleep_config, self.tokenizer = model, sleep, tokenizer
        self.seconds_awake = self.seconds_asleep = 0.0
        self.origin = Origin()
        state = model.initial_state(1)
        sleep.check(state.memory)
        if memory is not None:
            if memory.batch_size not in (0, 1):
                raise ValueError(
                    f"memory must have one row, got {memory.batch_size}; take one with memory[[0]]"
                )
            state = State(Memory(memory.like(state.memory).layers), state.cache)
            self.origin = memory.origin or self.origin
        self.stream = Stream.begin(state, tokens=self.origin.tokens, sleeps=self.origin.sleeps)

    # What it holds

    @property
    def working(self) -> Cache:
        """Working memory: keys and values of the open window (and what sliding eviction kept)."""
        return self.stream.state.cache

    @property
    def memory(self) -> Memory:
        """Consolidated memory: the fast weights now, one row; within a window with what it wrote awake."""
        memory = self.stream.state.memory
        origin = replace(
            self.origin,
            model=model_identity(self.model),
            tokens=self.stream.tokens,
            sleeps=self.stream.sleeps,
            passes=self.sleep_config.passes,
            rule=tuple(k if has else None for has, k in zip(memory.writes, self.model.kinds, strict=True)),
        )
        return replace(memory, origin=origin)

    @property
    def permanent(self) -> Mapping[str, Tensor]:
        """Permanent memory: the slow weights, which no reading and no sleep changes."""
        weights: Mapping[str, Tensor] = getattr(self.model, "state_dict", dict)()
        return weights

    @property
    def stats(self) -> Stats:
        """Counts, times and bytes."""
        s = self.stream
        return Stats(
            tokens=s.tokens,
            sleeps=s.sleeps,
            window_tokens=len(s.window),
            seconds_awake=self.seconds_awake,
            seconds_asleep=self.seconds_asleep,
            working_bytes=s.state.cache.nbytes,
            memory_bytes=s.state.memory.nbytes,
            permanent_bytes=sum(w.nbytes for w in self.permanent.values()),
            peak_bytes=s.peak_bytes,
        )

    # Reading and sleeping

    def read(self, text: Readable) -> None:
        """Read any amount of text or tokens, sleeping at window ends.

        Raises:
            ValueError: for text without a tokenizer, or tokens outside the vocabulary.
            BrokenSleep: if a sleep left NaN or infinity. The session is back where that window began.
        """
        SessionBatch([self]).read([text])

    def sleep(self, passes: int | None = None) -> None:
        """Sleep on the open window now, full or not, and evict it; nothing happens if it is empty.

        Args:
            passes: N of this sleep; default that of the configuration.

        Raises:
            ValueError: if the model never sleeps (`window=None`) or `passes` is less than 1.
            BrokenSleep: as `read`.
        """
        SessionBatch([self]).sleep(passes)

    def reset(self) -> None:
        """Forget everything: `S = 0`, nothing read, counts and times from zero."""
        new = Session(self.model, self.sleep_config)
        self.stream, self.origin = new.stream, new.origin
        self.seconds_awake = self.seconds_asleep = 0.0

    def fork(self) -> "Session":
        """A second session that has read the same; neither changes the other. Its parent is this one."""
        other = Session(self.model, self.sleep_config, self.tokenizer)
        other.stream, other.origin = self.stream, self.origin.child()
        other.seconds_awake, other.seconds_asleep = self.seconds_awake, self.seconds_asleep
        return other

    # Asking

    @overload
    def generate(
        self,
        prompt: Readable = ...,
        max_new_tokens: int = ...,
        *,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int | None = ...,
        stop: Sequence[Piece] = ...,
        seed: int = ...,
        stream: Literal[False] = ...,
    ) -> str | list[int]: ...

    @overload
    def generate(
        self,
        prompt: Readable = ...,
        max_new_tokens: int = ...,
        *,
        temperature: float = ...,
        top_p: float = ...,
        top_k: int | None = ...,
        stop: Sequence[Piece] = ...,
        seed: int = ...,
        stream: Literal[True],
    ) -> Iterator[Piece]: ...

    def generate(
        self,
        prompt: Readable = (),
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        stop: Sequence[Piece] = (),
        seed: int = 0,
        stream: bool = False,
    ) -> str | list[int] | Iterator[Piece]:
        """Read the prompt, then write: one forward pass a token.

        What is written is read like any other text: it enters the window, and a full window is slept on
        before the next token is read. `session.fork().generate(...)` leaves this session as it is.

        Args:
            prompt: text or tokens; may be empty if the window is not.
            max_new_tokens: most tokens to write.
            temperature: 0: the likeliest token.
            top_p: see `Sampling`.
            top_k: see `Sampling`.
            stop: texts or token numbers that end the answer; read, but not part of what is returned.
            seed: of the draws; the same seed, session and prompt give the same answer.
            stream: yield pieces of text (or tokens) as they come.

        Returns:
            Text, or a list of tokens where there is no tokenizer; with `stream` an iterator over its pieces.

        Raises:
            ValueError: for invalid options, or an empty prompt to an empty window.
            BrokenSleep: as `read`.
        """
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
        batch = SessionBatch([self])
        answers = [Answer(self.tokenizer, stop)]
        steps = batch._write([prompt], answers, max_new_tokens, sampling, [seed])
        if stream:
            return (piece for step in steps for _, piece in step)
        for _ in steps:
            pass
        return answers[0].whole()

    def logits(self, text: Readable) -> Tensor:
        """Logits `[T, V]` after each token of `text`, were it read now; the session stays as it is.

        Raises:
            ValueError: as `read`, or for an empty text.
            BrokenSleep: as `read`.
        """
        tokens = self.tokens(text)
        if not len(tokens):
            raise ValueError("text must have at least one token")
        return torch.cat(list(self._foresee(tokens)))

    def score(self, text: Readable) -> float:
        """Log-likelihood of `text` in nats, were it to come next; the session stays as it is.

        Where the open window is empty (at the beginning, and after `sleep()`) nothing predicts the first
        token, and it is left out.

        Raises:
            ValueError: as `read`.
            BrokenSleep: as `read`.
        """
        tokens, total, done = self.tokens(text), 0.0, 0
        before = next_logits(self.model, self.sleep_config, self.stream) if len(self.stream.window) else None
        for logits in self._foresee(tokens):
            seen = logits if before is None else torch.cat([before[None], logits])
            first = done if before is not None else 1
            targets = tokens[first : done + len(logits)].to(seen.device)
            log_p = seen.to(torch.promote_types(seen.dtype, torch.float32))[: len(targets)].log_softmax(-1)
            total += float(log_p.gather(1, targets[:, None]).sum())
            before, done = logits[-1], done + len(logits)
        return total

    def _foresee(self, tokens: Tensor) -> Iterator[Tensor]:
        for step in stream.read(self.model, self.sleep_config, [self.stream], [tokens], logits=True):
            if step.broken:
                raise BrokenSleep(_broken([0], [step.streams[0]]))
            if step.logits is not None and len(step.logits[0]):
                yield step.logits[0]

    def tokens(self, text: Readable) -> Tensor:
        """`[n]` int64: the tokens of a text, or tokens checked against the vocabulary.

        Raises:
            ValueError: for text without a tokenizer, or tokens outside the vocabulary.
        """
        if isinstance(text, str):
            if self.tokenizer is None:
                raise ValueError("text must be tokens: this session has no tokenizer")
            text = self.tokenizer.encode(text)
        tokens = torch.as_tensor(text, device="cpu")
        if tokens.ndim != 1 or (len(tokens) and (tokens.is_floating_point() or tokens.is_complex())):
            raise ValueError(f"tokens must be one row of whole numbers, got {tokens.dtype} {[*tokens.shape]}")
        tokens = tokens.to(torch.int64, copy=True)
        size = getattr(getattr(self.model, "config", None), "vocab_size", None)
        if len(tokens) and (int(tokens.min()) < 0 or (size is not None and int(tokens.max()) >= size)):
            worst = int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())
            raise ValueError(f"tokens must lie in 0 ... {'V - 1' if size is None else size - 1}, got {worst}")
        return tokens

    # Files

    def save(
        self,
        path: str | Path,
        *,
        storage: Storage | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Write the session to a file, atomically, so that `load` goes on exactly here.

        Args:
            path: file, replaced if there is one.
            storage: dtype of the fast weights in the file: float32, bfloat16 or int8; None: as they are.
            tags: added to those it has.

        Raises:
            ValueError: for a model without a `state_dict()`, or a state with NaN or infinity.
            OSError: if the file cannot be written; an old one is untouched.
        """
        self.origin = replace(self.origin, tags={**self.origin.tags, **(tags or {})})
        origin = self.memory.origin
        assert origin is not None
        saving.write(Path(path), self.stream, origin, self.sleep_config, storage)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Backbone,
        tokenizer: Tokenizer | None = None,
        *,
        sleep: SleepConfig | None = None,
    ) -> Self:
        """Take a saved session up, exactly where it was.

        Args:
            path: the file.
            model: the model that wrote it.
            tokenizer: for text.
            sleep: window and passes for a file of `Memory.save`, which has none; else those of the file hold.

        Raises:
            ValueError: as `Memory.load`, or if the file holds a memory alone and there is no `sleep`.
            OSError: if there is no such file.
        """
        start, origin, sleep, window = saving.read(Path(path), model, sleep)
        session = cls(model, sleep, tokenizer)
        try:
            window = session.tokens(window)
        except ValueError as error:
            raise ValueError(f"{path}: its open window is damaged: {error}") from None
        session.origin = origin
        session.stream = Stream.begin(start, tokens=origin.tokens, sleeps=origin.sleeps)
        if len(window):
            session.stream = stream.awake(model, sleep, [session.stream], [window]).streams[0]
        return session


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
        if len({id(s) for s in self.sessions}) < len(self.sessions):
            raise ValueError("sessions must not hold one twice; fork it")
        first = self.sessions[0]
        if any(s.model is not first.model or s.sleep_config != first.sleep_config for s in self.sessions):
            raise ValueError("sessions must have the same model and the same sleep")
        self.model, self.sleep_config = first.model, first.sleep_config

    def read(self, texts: Sequence[Readable]) -> None:
        """Read a text on each row; an empty one leaves its row as it is.

        Raises:
            ValueError: as `Session.read`, before anything is read.
            BrokenSleep: if a sleep of some row left NaN or infinity; the other rows have read all of theirs.
        """
        self._read(self._encoded(texts))

    def read_with_logits(self, texts: Sequence[Readable]) -> list[Tensor]:
        """Read a text on each row, as `read` does; the logits `[t, V]` after each of its t tokens.

        Raises:
            ValueError: as `read`.
            BrokenSleep: as `read`.
        """
        logits = self._read(self._encoded(texts), logits=True)
        size = next((len(row[0]) for row in logits.values()), 0)
        return [logits.get(row, torch.empty(0, size)) for row in range(len(self.sessions))]

    def sleep(self, passes: int | None = None) -> None:
        """Sleep now on all open windows, together; see `Session.sleep`."""
        if self.sleep_config.window is None:
            raise ValueError("window=None: this model never sleeps; give its SleepConfig a window")
        passes = self.sleep_config.passes if passes is None else passes
        if passes < 1:
            raise ValueError(f"passes must be at least 1, got {passes}")
        rows = [row for row, s in enumerate(self.sessions) if len(s.stream.window)]
        if rows:
            streams = [self.sessions[row].stream for row in rows]
            new = [stream.no_tokens()] * len(rows)
            begin = time.perf_counter()
            step = stream.asleep(self.model, self.sleep_config, streams, new, passes=passes)
            self._take(step._replace(rows=rows, broken=[rows[i] for i in step.broken]), begin)
            self._report([rows[i] for i in step.broken])

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
        answers = [Answer(s.tokenizer, stop) for s in self.sessions]
        seeds = [0] * len(self.sessions) if seeds is None else seeds
        for _ in self._write(prompts, answers, max_new_tokens, sampling, seeds):
            pass
        return [answer.whole() for answer in answers]

    def _encoded(self, texts: Sequence[Readable]) -> list[Tensor]:
        if len(texts) != len(self.sessions):
            raise ValueError(f"texts must be {len(self.sessions)}, one a session, got {len(texts)}")
        return [session.tokens(text) for session, text in zip(self.sessions, texts, strict=True)]

    def _read(self, tokens: Sequence[Tensor], *, logits: bool = False) -> dict[int, Tensor]:
        """Read on; the logits `[t, V]` after each token of the rows that have tokens, if asked for."""
        seen, broken = dict[int, list[Tensor]](), list[int]()
        streams, begin = [s.stream for s in self.sessions], time.perf_counter()
        for step in stream.read(self.model, self.sleep_config, streams, tokens, logits=logits):
            begin = self._take(step, begin)
            broken += step.broken
            for row, out in zip(step.rows, step.logits or [], strict=False):
                if len(out):  # a sleep before the next token reads nothing new
                    seen.setdefault(row, []).append(out)
        self._report(broken)
        return {row: torch.cat(parts) for row, parts in seen.items()}

    def _write(
        self,
        prompts: Sequence[Readable],
        answers: Sequence[Answer],
        max_new_tokens: int,
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> Iterator[list[tuple[int, Piece]]]:
        """Checks at once; then yields, token by token, the rows' new pieces."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if len(seeds) != len(self.sessions):
            raise ValueError(f"seeds must be {len(self.sessions)}, one a session, got {len(seeds)}")
        tokens = self._encoded(prompts)
        for session, prompt in zip(self.sessions, tokens, strict=True):
            if not len(prompt) and not len(session.stream.window):
                raise ValueError("prompt must have at least one token: the window is empty")
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def steps() -> Iterator[list[tuple[int, Piece]]]:
            self._read([prompt[:-1] for prompt in tokens])
            logits = self._read([prompt[-1:] for prompt in tokens], logits=True)
            for row, prompt in enumerate(tokens):
                if not len(prompt):
                    logits[row] = next_logits(self.model, self.sleep_config, self.sessions[row].stream)[None]
            for written in range(1, max_new_tokens + 1):
                rows, new = list(logits), [stream.no_tokens()] * len(self.sessions)
                for row in rows:
                    token = sampling.draw(logits[row][-1], generators[row])
                    answers[row].add(token)
                    new[row] = torch.tensor([token])
                ended = {row for row in rows if answers[row].stopped or written == max_new_tokens}
                try:
                    yield [(row, p) for row in rows for p in answers[row].pieces(last=row in ended)]
                finally:  # what was shown has been read, even if nobody wants more
                    logits = self._read(new, logits=True)
                for row in ended:
                    del logits[row]
                if not logits:
                    return

        return steps()

    def _take(self, step: Step, begin: float) -> float:
        """Let the sessions go on from a step that began then; the time now."""
        now = time.perf_counter()
        for row, after in zip(step.rows, step.streams, strict=True):
            session = self.sessions[row]
            session.stream = after
            if step.asleep:
                session.seconds_asleep += now - begin
            else:
                session.seconds_awake += now - begin
        return now

    def _report(self, broken: Sequence[int]) -> None:
        if broken:
            raise BrokenSleep(_broken(broken, [self.sessions[row].stream for row in broken]))


def next_logits(model: Backbone, sleep: SleepConfig, after: Stream) -> Tensor:
    """Logits `[V]` after the last token of an open window, which is read once more for them."""
    begin = stream.awake(model, sleep, [after.reopened()], [after.window[:-1]]).streams
    out = stream.awake(model, sleep, begin, [after.window[-1:]], logits=True).logits
    assert out is not None
    return out[0][-1]


def _broken(rows: Sequence[int], streams: Sequence[Stream]) -> str:
    places = ", ".join(f"row {row}: token {s.tokens}" for row, s in zip(rows, streams, strict=True))
    return (
        f"a sleep left NaN or infinity ({places}); the memory before it was kept, "
        "and the tokens of that window are not read"
    )
