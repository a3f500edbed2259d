"""From a prompt to an answer: what is known already is found, the rest read, the answer written and kept."""

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from lmsleep.serve.engine import Busy, Closing, Engine, Happened, What, settled
from lmsleep.serve.errors import ApiError, draining, invalid
from lmsleep.serve.log import LOG
from lmsleep.serve.store import Kept, Store
from lmsleep.session import Answer, BrokenSleep, Row, Sampling
from lmsleep.session.answer import Piece
from lmsleep.session.rows import Odds
from lmsleep.text.chat import Chat
from lmsleep.text.tokenizers import Spelled, Tokenizer, begun, check_tokens
from lmsleep.training.device import is_out_of_memory

SWEEP_EVERY = 60.0  # seconds
PATIENCE = 60.0  # seconds that what is under way may take when the server ends


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How an answer is to be written.

    Attributes:
        sampling: how tokens are drawn.
        longest: most tokens.
        stop: what ends it.
        seed: of the draws; None: any.
        odds: how many likeliest tokens are told beside each; None: no odds.
    """

    sampling: Sampling = field(default_factory=Sampling)
    longest: int
    stop: tuple[Piece, ...] = ()
    seed: int | None = None
    odds: int | None = None


@dataclass(eq=False)
class Followed:
    """A row on its way, as it is now."""

    row: Row


@dataclass(frozen=True, kw_only=True)
class Event:
    """What happened to a row; holds no state of its own, so that any number may wait for a slow reader.

    Attributes:
        what: see `Happened`.
        pieces: what was added to its answer.
        token: that was drawn.
        odds: of it, if they are kept.
        logits: `[t, V]` after each token that was read, if they are kept.
        followed: the row.
    """

    what: What
    pieces: tuple[Piece, ...]
    token: int | None
    odds: Odds | None
    logits: Tensor | None
    followed: Followed

    @property
    def row(self) -> Row:
        """Return the row as it is now, which may be after this event."""
        return self.followed.row


@dataclass(eq=False)
class Written:
    """An answer as it grows, and what it took.

    Attributes:
        before: the stream that it goes on from.
        prompt: tokens that had to be read.
        known: tokens of the prompt that were known already.
        text: what is written so far.
        tokens: all tokens that were drawn.
        odds: of each of them, if they are wanted.
        row: as it is now.
        whole: whether it came to its own end.
        after: where it is kept, once it is.
    """

    before: Kept
    prompt: Tensor
    known: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    odds: list[Odds] = field(default_factory=list)
    row: Row | None = None
    whole: bool = False
    after: Kept | None = None

    @property
    def finish_reason(self) -> str:
        """Say why it ended: "stop" or "length"."""
        return "stop" if self.whole else "length"

    @property
    def sleeps(self) -> int:
        """Count the sleeps on the way."""
        return 0 if self.row is None else self.row.stream.sleeps - self.before.stream.sleeps

    @property
    def prompt_tokens(self) -> int:
        """Count the tokens of the prompt, known ones included."""
        return self.known + len(self.prompt)


class Service:
    """Ties engine, store and tokenizer together; all its methods run in the event loop.

    Args:
        engine: writes, reads and sleeps.
        store: keeps streams.
        tokenizer: of the model.
        chat: writes conversations as text.
        name: of the model.
        longest: tokens of an answer where nobody says how many.
        sleep_after: seconds that a stream which ran past the end of its window rests before it is slept on.
            Whoever goes on from it sooner goes on with all that it has read in sight, and it does not sleep.
    """

    _sweeper: "asyncio.Task[None]"

    def __init__(
        self,
        engine: Engine,
        store: Store,
        tokenizer: Tokenizer,
        chat: Chat,
        *,
        name: str,
        longest: int = 1024,
        sleep_after: float = 0.0,
    ) -> None:
        self.engine, self.store, self.tokenizer, self.chat, self.name = engine, store, tokenizer, chat, name
        # A task answers with one token; a text has no natural end but its own.
        self._natural = 1 if isinstance(tokenizer, Spelled) else None
        self.longest = self._natural or longest
        self.created, self.sleep_after = int(time.time()), sleep_after
        # Streams with a debt by their ids: those that rest, and those that sleep or are about to.
        self._resting = dict[str, asyncio.TimerHandle]()
        self._settling = dict[str, asyncio.Task[None]]()

    def start(self) -> None:
        """Begin to work."""
        self.engine.start()
        self._sweeper = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Bring to its end what is under way, and let go of the store."""
        self._sweeper.cancel()
        for rest in self._resting.values():  # they stay in debt; whoever goes on from one finds it so
            rest.cancel()
        if settling := list(self._settling.values()):
            await asyncio.wait(settling, timeout=PATIENCE)
        await asyncio.to_thread(self.engine.close, PATIENCE)
        await asyncio.to_thread(self.store.close)

    @property
    def idle(self) -> bool:
        """Say whether nothing is under way."""
        return not self.engine.waiting and not self._settling

    async def _sweep(self) -> None:
        """Let the store go of what is old, now and then."""
        while True:
            await asyncio.sleep(SWEEP_EVERY)
            try:
                if gone := await asyncio.to_thread(self.store.sweep):
                    LOG.info("%d streams were not used for long and are gone", gone)
            except Exception:  # the next time it may do better
                LOG.exception("the store was not swept")

    def tokens(self, text: str | Sequence[int], param: str, *, first: bool = True) -> Tensor:
        """Return the tokens of a text, or checked tokens; `first`: a stream begins with them.

        Raises:
            ApiError: for what the model cannot read.
        """
        try:
            if isinstance(text, str):
                numbers = begun(self.tokenizer, text) if first else self.tokenizer.encode(text)
            else:
                numbers = list(text)
            found = torch.tensor(numbers, dtype=torch.int64)
            check_tokens(found, self.engine.model.vocab_size)
        except (ValueError, OverflowError, RuntimeError) as error:
            raise invalid(str(error), param) from None
        return found

    async def prefix(self, owner: str, tokens: Tensor) -> tuple[Kept, Tensor]:
        """Return the stream of this owner that has read most of the beginning of `tokens`, and the rest."""
        while True:
            kept, known = await asyncio.to_thread(self.store.longest_prefix, owner, tokens)
            if not await self._slept(kept.id):
                return kept, tokens[known:]

    async def find(self, owner: str, stream: str) -> Kept | None:
        """Return a stream of this owner: one that rests as it is, one that is due once it has slept."""
        await self._slept(stream)
        return await asyncio.to_thread(self.store.find, owner, stream)

    async def _slept(self, stream: str) -> bool:
        """Keep a stream that rests from its sleep, or wait for one that has begun, and say whether it had."""
        if (resting := self._resting.pop(stream, None)) is not None:
            resting.cancel()
        if (task := self._settling.get(stream)) is None:
            return False
        await asyncio.wait([task])
        return True

    async def whole(self, kept: Kept) -> Kept:
        """Return a stream whose open window has been read, so that its state is what it knows."""
        if not len(kept.unread):
            return kept
        row = Row(stream=kept.stream, unread=kept.unread)
        async for event in self.follow(row):
            row = event.row
        return replace(kept, stream=row.stream, unread=kept.unread[:0])

    async def write(self, written: Written, wanted: Wanted) -> AsyncGenerator[Event]:
        """Read the prompt and write the answer; what happens is told as it happens.

        Leaving early (a client that went away) ends the answer after the token that is being written.

        Raises:
            ApiError: if there is nothing to go on from, too many wait, or a sleep broke.
        """
        begin = written.before.stream
        unread = torch.cat([written.before.unread, written.prompt])
        if not len(unread) and not len(begin.window):
            raise invalid("there is nothing to answer: the prompt is empty", "input")
        seed = random.getrandbits(63) if wanted.seed is None else wanted.seed
        row = Row(
            stream=begin,
            unread=unread,
            budget=wanted.longest,
            answer=Answer(self.tokenizer, wanted.stop),
            sampling=wanted.sampling,
            generator=torch.Generator().manual_seed(seed % 2**63),
            keep_odds=wanted.odds,
        )
        async with aclosing(self.follow(row)) as events:
            async for event in events:
                written.row = event.row
                if event.token is not None:
                    written.tokens.append(event.token)
                    written.text += "".join(map(str, event.pieces))
                    if event.odds is not None:
                        written.odds.append(event.odds)
                yield event
        answer = row.answer if written.row is None else written.row.answer
        written.whole = answer.stopped or len(written.tokens) == self._natural

    async def follow(self, row: Row) -> AsyncGenerator[Event]:
        """Let a row go through the engine and tell what happens to it; leaving early ends it.

        Raises:
            ApiError: as `write`.
        """
        loop, queue, followed = asyncio.get_running_loop(), asyncio.Queue[Event](), Followed(row)

        def tell(event: Happened) -> None:
            followed.row = event.row
            token = int(event.row.unread[-1]) if event.what == "wrote" else None
            told = Event(
                what=event.what,
                pieces=event.pieces,
                token=token,
                odds=event.odds,
                logits=event.row.logits if event.what in ("read", "slept") else None,
                followed=followed,
            )
            with suppress(RuntimeError):  # the loop has been closed: nobody listens any more
                loop.call_soon_threadsafe(queue.put_nowait, told)

        try:
            request = self.engine.submit(row, tell)
        except Busy as busy:
            raise ApiError(429, str(busy), code="busy", retry_after=1) from None
        except Closing:
            raise draining() from None
        try:
            while True:
                event = await queue.get()
                if event.what == "done":
                    if event.row.error is not None:
                        raise self._broken(event.row.error)
                    yield event
                    return
                yield event
        finally:
            self.engine.leave(request)

    def _broken(self, error: Exception) -> ApiError:
        if isinstance(error, BrokenSleep):
            return ApiError(500, str(error), code="broken_sleep")
        if isinstance(error, ValueError):
            return ApiError(500, str(error), code="broken_row")
        if is_out_of_memory(error):
            said = "there was no memory for this request; come back later"
            return ApiError(503, said, code="out_of_memory", retry_after=5)
        # Anything else may hold paths or the like: it goes to the log alone.
        return ApiError(
            500, "the model failed on this request; the log of the server says how", code="model_failed"
        )

    async def keep(self, owner: str, written: Written) -> Kept:
        """Keep where an answer has ended, on disk when this returns.

        Raises:
            ApiError: if it cannot be written.
        """
        assert written.row is not None
        read = torch.cat([written.prompt, torch.tensor(written.tokens, dtype=torch.int64)])
        after = written.row.stream
        written.after = await asyncio.to_thread(self.store.keep, owner, written.before, read, after)
        if (late := settled(written.row, self.engine.sleep)) is not None:
            due = partial(self._let_sleep, owner, written.after, late)
            if self.sleep_after:
                rest = asyncio.get_running_loop().call_later(self.sleep_after, due)
                self._resting[written.after.id] = rest
            else:
                due()
        return written.after

    def _let_sleep(self, owner: str, kept: Kept, late: Row) -> None:
        self._resting.pop(kept.id, None)
        task = self._settling[kept.id] = asyncio.create_task(self._settle(owner, kept, late))
        task.add_done_callback(lambda _: self._settling.pop(kept.id, None))

    async def remember(self, owner: str, written: Written) -> None:
        """Keep where an answer has ended, if that can be done: what is sent again is else read anew."""
        try:
            await self.keep(owner, written)
        except ApiError as error:
            LOG.warning("an answer was not kept: %s", error)

    async def _settle(self, owner: str, kept: Kept, late: Row) -> None:
        """Sleep where an answer had no time to, and keep the stream as it is then under the same name."""
        try:
            async for event in self.follow(replace(late, stream=kept.stream.reopened())):
                if event.what == "done":
                    await asyncio.to_thread(self.store.settle, owner, kept, event.row.stream)
        except ApiError as error:  # it stays as it was kept: whoever goes on from it sleeps first
            LOG.warning("a sleep that was due is put off: %s", error)
