"""Hold one unbounded stream with bounded memory: it is read, slept on, asked and saved."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self, overload

import torch
from torch import Tensor

from lmsleep.memory import model_identity
from lmsleep.session import saving, stream
from lmsleep.session.answer import Answer, Piece
from lmsleep.session.distillation import Distillation, SlowWeights, Teacher, distil
from lmsleep.session.owner import Owner, finish, proceed, using
from lmsleep.session.rows import Row, advance, raise_first
from lmsleep.session.sampling import Sampling
from lmsleep.session.stream import Stream, next_logits
from lmsleep.sleep import Backbone, SleepConfig
from lmsleep.state import Cache, Memory, Origin, State, Storage
from lmsleep.text.characters import check_characters
from lmsleep.text.tokenizers import Tokenizer, begun, check_tokens

Readable = str | Sequence[int] | Tensor


@dataclass(frozen=True)
class Stats:
    """Counts of what a session has done and what it holds."""

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
    history_bytes: int
    """What is kept for `rewind()` alone."""


class Session(Owner):
    """A stream that is read, slept on, asked and saved, on any `Backbone`.

    Three layers of memory: `working` (keys and values of the open window), `memory` (fast weights: what
    sleep consolidated and the window wrote since), `permanent` (slow weights, never changed). The open
    window sleeps when it is full and the stream goes on, or when `sleep()` is called.

    Args:
        model: any `Backbone`; its slow weights must not change while the session lives.
        sleep: window and passes. Looped wake passes are refused: they cannot read token by token.
        tokenizer: for reading and writing text; None: tokens only.
        memory: one row of fast weights to begin with; default `S = 0`.
        history: how many calls of `read`, `sleep` and `generate` can be taken back (`rewind`). Each holds the
            state before it: at most the fast weights and one window of working memory, both twice.

    Raises:
        ValueError: for a memory that does not fit the model or that another method wrote, a loop that could
            write nothing into it, more than one wake pass, or a negative history.
    """

    def __init__(
        self,
        model: Backbone,
        sleep: SleepConfig,
        tokenizer: Tokenizer | None = None,
        *,
        memory: Memory | None = None,
        history: int = 1,
    ) -> None:
        if sleep.wake_passes != 1:
            raise ValueError(f"wake_passes={sleep.wake_passes}: a session reads in one wake pass only")
        self.origin = Origin()
        sleep.consolidator.check_model(model)
        state = model.initial_state(1).detach()  # it may begin with what is trained
        # Also what passes=1 sleeps with in `sleep(n)`: found out now, and not after the reading.
        sleep.with_passes(max(sleep.passes, 2) if sleep.window else sleep.passes).check(state.memory)
        sleep.eviction.check(model)
        if memory is not None:
            if memory.batch_size not in (0, 1):  # 0 where no block has fast weights
                raise ValueError(
                    f"memory must have one row, got {memory.batch_size}; take one with memory[[0]]"
                )
            sleep.check_origin(memory.origin)
            # Without the origin, which the session keeps and brings up to date.
            state = State(Memory(memory.like(state.memory).layers), state.cache)
            self.origin = memory.origin or self.origin
        begin = Stream.begin(state, tokens=self.origin.tokens, sleeps=self.origin.sleeps)
        super().__init__(model, sleep, begin, history)
        self.tokenizer = tokenizer

    # What it holds

    @property
    def working(self) -> Cache:
        """Return the working memory: keys and values of the open window (and what eviction kept)."""
        return self.stream.state.cache

    @property
    def memory(self) -> Memory:
        """Return the fast weights now, one row; within a window with what it wrote awake."""
        stream = self.stream  # once: another thread may be reading on
        return replace(stream.state.memory, origin=self._signed(self.origin, stream))

    def _signed(self, origin: Origin, stream: Stream) -> Origin:
        """Return an origin with what is known of the session where `stream` is."""
        writes = stream.state.memory.writes
        return replace(
            origin,
            model=model_identity(self.model),
            tokens=stream.tokens,
            sleeps=stream.sleeps,
            passes=self.sleep_config.passes,
            method=self.sleep_config.method,
            rule=tuple(k if has else None for has, k in zip(writes, self.model.kinds, strict=True)),
        )

    @property
    def permanent(self) -> Mapping[str, Tensor]:
        """Return the slow weights, which no reading and no sleep changes."""
        # A `Backbone` need not be a module: one without a state_dict() has none that we know of.
        weights: Mapping[str, Tensor] = getattr(self.model, "state_dict", dict)()
        return weights

    @property
    def stats(self) -> Stats:
        """Return counts, times and bytes."""
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
            history_bytes=self.history_bytes,
        )

    # Reading and sleeping

    def read(self, text: Readable) -> None:
        """Read any amount of text or tokens, sleeping at window ends.

        Raises:
            ValueError: for text without a tokenizer, or tokens outside the vocabulary.
            BrokenSleep: if a sleep left NaN or infinity. The session is back where that window began.
        """
        finish([self], [Row(stream=self.stream, unread=self.tokens(text))])

    def sleep(self, passes: int | None = None) -> None:
        """Sleep on the open window now, full or not, and evict it; nothing happens if it is empty.

        Args:
            passes: N of this sleep; default that of the configuration.

        Raises:
            ValueError: if the model never sleeps (`window=None`) or `passes` is less than 1.
            BrokenSleep: as `read`.
        """
        finish([self], [self.napping(passes)])

    def napping(self, passes: int | None) -> Row:
        """Return a row that sleeps on the open window; argument and errors are those of `sleep`."""
        if self.sleep_config.window is None:
            raise ValueError("window=None: this model never sleeps; give its SleepConfig a window")
        sleep = self.sleep_config if passes is None else self.sleep_config.with_passes(passes)
        return Row(stream=self.stream, nap=sleep.passes)

    def reset(self) -> None:
        """Forget everything: `S = 0`, nothing read, counts and times from zero, nothing to take back.

        Raises:
            RuntimeError: if another thread uses the session.
        """
        new = Session(self.model, self.sleep_config)
        with using([self]):
            self.stream, self.origin = new.stream, new.origin
            self.seconds_awake = self.seconds_asleep = 0.0
            self.past.clear()

    def fork(self) -> "Session":
        """Return a second session that has read the same, a child of this one; neither changes the other."""
        # Streams are immutable, so both may hold the same one.
        other = Session(self.model, self.sleep_config, self.tokenizer, history=self.history)
        other.stream, other.origin = self.stream, self.origin.child()
        other.past.extend(self.past)
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
            stop: texts or token numbers that end the answer, as all of `tokenizer.ends` do; read, but not
                part of what is returned.
            seed: of the draws; the same seed, session and prompt give the same answer.
            stream: yield pieces of text (or tokens) as they come.

        Returns:
            Text, or a list of tokens where there is no tokenizer; with `stream` an iterator over its pieces.

        Raises:
            ValueError: for invalid options, an empty prompt to an empty window, or logits with NaN.
            BrokenSleep: as `read`.
            RuntimeError: with `stream`, if something else has changed the session since the last piece.
        """
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
        row = self.written(prompt, max_new_tokens, sampling, stop, seed)
        if stream:
            return self._pieces(row)
        return finish([self], [row])[0].answer.whole()

    def written(
        self, prompt: Readable, max_new_tokens: int, sampling: Sampling, stop: Sequence[Piece], seed: int
    ) -> Row:
        """Return a row that reads the prompt, then writes; arguments and errors are those of `generate`."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        return Row(
            stream=self.stream,
            unread=self.tokens(prompt),
            budget=max_new_tokens,
            answer=Answer(self.tokenizer, stop),
            sampling=sampling,
            generator=torch.Generator().manual_seed(seed),
        )

    def _pieces(self, row: Row) -> Iterator[Piece]:
        # Closed at once when the caller leaves early, not when it is collected: what was shown is to be read.
        with closing(proceed([self], [row])) as steps:
            for [written] in steps:
                yield from written.pieces

    def logits(self, text: Readable) -> Tensor:
        """Return logits `[T, V]` after each token of `text`, were it read now; the session stays as it is.

        Raises:
            ValueError: as `read`, or for an empty text.
            BrokenSleep: as `read`.
        """
        tokens = self.tokens(text)
        if not len(tokens):
            raise ValueError("text must have at least one token")
        return torch.cat(list(self._foresee(self.stream, tokens)))

    def score(self, text: Readable) -> float:
        """Return the log-likelihood of `text` in nats, were it to come next; the session stays as it is.

        Where the open window is empty (at the beginning, and after `sleep()`) nothing predicts the first
        token, and it is left out.

        Raises:
            ValueError: as `read`.
            BrokenSleep: as `read`.
        """
        tokens, total, done = self.tokens(text), 0.0, 0
        stream = self.stream  # once: another thread may be reading on
        before: Tensor | None = None
        if len(stream.window):
            [before] = next_logits(self.model, self.sleep_config, [stream])
        for logits in self._foresee(stream, tokens):
            # Logits predict the token after theirs, so the last of a window lie a piece before their target.
            # `seen[i]` predicts `targets[i]`, and the last of it waits for the next piece.
            seen = logits if before is None else torch.cat([before[None], logits])
            first = done if before is not None else 1
            targets = tokens[first : done + len(logits)].to(seen.device)
            # In float32 or better: logits of low precision round away what a sum over a text adds up.
            log_p = seen.to(torch.promote_types(seen.dtype, torch.float32))[: len(targets)].log_softmax(-1)
            total += float(log_p.gather(1, targets[:, None]).sum())
            before, done = logits[-1], done + len(logits)
        if math.isnan(total):
            raise ValueError("logits are NaN, so the text has no likelihood; look at the model's weights")
        return total

    # Slow weights

    def consolidate(
        self,
        text: Readable | None = None,
        how: Distillation | None = None,
        *,
        prompt: Readable = (),
        progress: bool = False,
    ) -> SlowWeights:
        """Distil what the session holds, and a text, into a LoRA adapter of its model; it stays as it is.

        The teacher is the model as it stands in the session, with `S` and the open window, and with a window
        of the text in view besides; the student is the model with the adapter and an empty state. They are
        made to predict alike on the text and on what the teacher writes after it. With the adapter the model
        knows some of it without memory and context. The session's model gets no adapter: `model` of the
        result, which shares its weights, has it, `save` writes it, `peft` loads it.

        Args:
            text: to distil besides the memory, for a session keeps none; in windows as long as those of the
                session, or whole if its `window` is None. None: on what the teacher writes alone.
            how: the options; default `Distillation()`.
            prompt: what each text that the teacher writes begins with; default nothing where something is in
                view to go on from, and else what the tokenizer puts before a text, or a line end.
            progress: draw progress bars.

        Returns:
            The adapter, and what became of the divergence between student and teacher.

        Raises:
            ValueError: if there is neither text nor memory, for a model that takes no adapter of `peft`, if
                the training diverges, and as `read`.
        """
        fresh = Session(self.model, self.sleep_config, self.tokenizer)  # texts as they begin
        how, stream = how or Distillation(), self.stream
        tokens, cue = fresh.tokens(() if text is None else text), fresh.tokens(prompt)
        if text is not None and not len(tokens):
            raise ValueError("text must have at least one token")
        held = stream.state
        known = held.cache.nbytes or any(bool(S.any()) for S in held.memory.tensors())
        if not len(tokens) and not known:
            raise ValueError("there is nothing to distil: no text is given, and the session has read nothing")
        if not len(tokens) and not len(stream.window) and not len(cue):
            begin = () if self.tokenizer is None else self.tokenizer.begin or self.tokenizer.encode("\n")
            if not len(cue := fresh.tokens(begin)):
                raise ValueError("prompt must have at least one token: nothing is in view to go on from")
        windows = tokens.split(self.sleep_config.window or len(tokens)) if len(tokens) else ()
        ends = () if self.tokenizer is None else self.tokenizer.ends
        teacher = Teacher(self.model, self.sleep_config, stream, cue, ends)
        return distil(teacher, windows, how, show=progress)

    def _foresee(self, begin: Stream, tokens: Tensor) -> Iterator[Tensor]:
        """Yield the logits after `tokens`, window by window, from a row that nobody keeps."""
        rows = [Row(stream=begin, unread=tokens, keep_logits=True)]
        while not rows[0].done:
            rows = advance(self.model, self.sleep_config, rows)
            raise_first(rows)
            if (logits := rows[0].logits) is not None and len(logits):
                yield logits

    def tokens(self, text: Readable) -> Tensor:
        """Return `[n]` int64: the tokens of a text, or tokens checked against the vocabulary.

        Where nothing was read yet, a text comes with what the tokenizer puts before it (`Tokenizer.begin`).

        Raises:
            ValueError: for text without a tokenizer, half a surrogate pair in it, or tokens outside the
                vocabulary.
        """
        if isinstance(text, str):
            if self.tokenizer is None:
                raise ValueError("text must be tokens: this session has no tokenizer")
            check_characters(text, "text")
            text = self.tokenizer.encode(text) if self.stream.tokens else begun(self.tokenizer, text)
        tokens = torch.as_tensor(text, device="cpu")
        check_tokens(tokens, self.model.vocab_size, self.tokenizer)
        return tokens.to(torch.int64, copy=True)  # the caller may write into theirs later

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
            tags: texts, added to those it has; they stay with the session, for its next save and its forks.

        Raises:
            ValueError: for a model without a `state_dict()`, a state with NaN or infinity, or anything else
                that `load` would refuse. File and session stay as they were.
            OSError: if the file cannot be written; an old one is untouched, and so is the session.
        """
        origin, stream = replace(self.origin, tags={**self.origin.tags, **(tags or {})}), self.stream
        saving.write(Path(path), stream, self._signed(origin, stream), self.sleep_config, storage)
        self.origin = origin

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Backbone,
        tokenizer: Tokenizer | None = None,
        *,
        sleep: SleepConfig | None = None,
        history: int = 1,
    ) -> Self:
        """Take a saved session up, exactly where it was.

        Args:
            path: the file.
            model: the model that wrote it.
            tokenizer: for text.
            sleep: for a file of `Memory.save`, which has none; else that of the file holds, and this one must
                have the same consolidator and eviction, of whatever options. Python files that the file's
                sleep names are run only if this one names them too.
            history: as of a new session; nothing that was read before can be taken back.

        Raises:
            ValueError: as `Memory.load`, if the file holds a memory alone and there is no `sleep`, or if
                `sleep` is of another method than what wrote the file.
            OSError: if there is no such file.
        """
        start, origin, sleep, window = saving.read(Path(path), model, sleep)
        session = cls(model, sleep, tokenizer, history=history)
        try:
            window = session.tokens(window)  # for the check: an embedding fails less kindly
        except ValueError as error:
            raise ValueError(f"{path}: its open window is damaged: {error}") from None
        session.origin = origin
        session.stream = Stream.begin(start, tokens=origin.tokens, sleeps=origin.sleeps)
        # A working memory out of a file may be one that no model leaves: one token shows it, and is not kept.
        held = start.cache.length or start.cache.kept
        reads = window if len(window) or not held else torch.zeros(1, dtype=torch.int64)
        if len(reads):  # in one pass, which leaves what the pieces that it came in left, up to rounding
            try:
                [read] = stream.awake(model, sleep, [session.stream], [reads]).streams
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, IndexError) as error:
                what = str(error).partition("\n")[0]
                raise ValueError(f"{path}: its working memory does not fit together: {what}") from None
            session.stream = read if len(window) else session.stream
        return session
