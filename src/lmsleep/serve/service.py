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

from lmsleep.serve.engine import Busy, Engine, Happened, settled
from lmsleep.serve.errors import ApiError, invalid
from lmsleep.serve.store import Kept, Store
from lmsleep.session import Answer, BrokenSleep, Row, Sampling
from lmsleep.session.answer import Piece
from lmsleep.session.rows import Odds
from lmsleep.text.chat import Chat
from lmsleep.text.tokenizers import Spelled, Tokenizer, begun, check_tokens


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
        sleeps: on the way.
    """

    before: Kept
    prompt: Tensor
    known: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    odds: list[Odds] = field(default_factory=list)
    row: Row | None = None
    sleeps: int = 0
    after: Kept | None = None

    @property
    def finish_reason(self) -> str:
        """Say why it ended: "stop" or "length"."""
        return "stop" if self.row is not None and self.row.answer.stopped else "length"

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
        self.longest = 1 if isinstance(tokenizer, Spelled) else longest
        self.created, self.sleep_after = int(time.time()), sleep_after
        # Streams with a debt by their ids: those that rest, and those that sleep or are about to.
        self._resting = dict[str, asyncio.TimerHandle]()
        self._settling = dict[str, asyncio.Task[None]]()

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
        await asyncio.shield(task)
        return True

    async def whole(self, kept: Kept) -> Kept:
        """Return a stream whose open window has been read, so that its state is what it knows."""
        if not len(kept.unread):
            return kept
        row = Row(stream=kept.stream, unread=kept.unread)
        async for event in self.follow(row):
            row = event.row
        return replace(kept, stream=row.stream, unread=kept.unread[:0])

    async def write(self, written: Written, wanted: Wanted) -> AsyncGenerator[Happened]:
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
                if event.what == "wrote":
                    written.tokens.append(int(event.row.unread[-1]))
                    written.text += "".join(map(str, event.pieces))
                    if event.odds is not None:
                        written.odds.append(event.odds)
                yield event
        written.sleeps = (
            row.stream.sleeps - begin.sleeps
            if written.row is None
            else written.row.stream.sleeps - begin.sleeps
        )

    async def follow(self, row: Row) -> AsyncGenerator[Happened]:
        """Let a row go through the engine and tell what happens to it.

        Raises:
            ApiError: as `write`.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Happened]()

        def tell(event: Happened) -> None:
            with suppress(RuntimeError):  # the loop has been closed: nobody listens any more
                loop.call_soon_threadsafe(queue.put_nowait, event)

        try:
            request = self.engine.submit(row, tell)
        except Busy as busy:
            raise ApiError(429, str(busy), code="busy", retry_after=1) from None
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
        # Anything else may hold paths or the like: it goes to the log alone.
        return ApiError(
            500, "the model failed on this request; the log of the server says how", code="model_failed"
        )

    async def keep(self, owner: str, written: Written) -> Kept:
        """Keep where an answer has ended, on disk when this returns."""
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

    async def _settle(self, owner: str, kept: Kept, late: Row) -> None:
        """Sleep where an answer had no time to, and keep the stream as it is then under the same name."""
        try:
            async for event in self.follow(replace(late, stream=kept.stream.reopened())):
                if event.what == "done":
                    await asyncio.to_thread(self.store.settle, owner, kept, event.row.stream)
        except ApiError:
            pass  # it stays as it was kept: whoever goes on from it sleeps first
