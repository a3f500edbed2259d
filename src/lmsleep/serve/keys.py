"""Who asks, and how much they may: bearer keys, each with a namespace of its own, and quotas."""

import hashlib
import hmac
import math
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from lmsleep.serve.errors import ApiError

MINUTE = 60.0


@dataclass(frozen=True, kw_only=True)
class Quota:
    """What an owner may use; None: without limit."""

    requests_a_minute: int | None = None
    tokens_a_minute: int | None = None
    memories: int | None = None
    bytes: int | None = None


@dataclass
class Lately:
    """What was used within the last minute.

    Attributes:
        used: when, and how much, the oldest first.
        total: of it.
    """

    used: deque[tuple[float, int]] = field(default_factory=deque)
    total: int = 0

    def add(self, amount: int, now: float) -> None:
        """Count an amount."""
        self.used.append((now, amount))
        self.total += amount

    def wait(self, most: int, now: float) -> float:
        """Return the seconds until less than `most` is in use; 0 if it is."""
        while self.used and self.used[0][0] <= now - MINUTE:
            self.total -= self.used.popleft()[1]
        left, wait = self.total, 0.0
        for when, amount in self.used:
            if left < most:
                break
            left, wait = left - amount, when + MINUTE - now
        return wait


@dataclass
class Owner:
    """Somebody with a namespace.

    Attributes:
        name: of the namespace; nothing outside of it is ever found.
        requests: made lately.
        tokens: read and written lately.
    """

    name: str
    requests: Lately = field(default_factory=Lately)
    tokens: Lately = field(default_factory=Lately)


class Keys:
    """Finds the owner of a request.

    Args:
        file: a line for each key, `NAME KEY`; None: no key is asked for, and there is one owner.
        quota: of each owner.

    Raises:
        ValueError: for a line of another form, a key that is short, or one twice.
        OSError: if the file cannot be read.
    """

    def __init__(self, file: Path | None = None, quota: Quota | None = None) -> None:
        self.quota = quota or Quota()
        self.open = Owner("local") if file is None else None
        self._owners = dict[bytes, Owner]()
        owners = dict[str, Owner]()
        for number, line in enumerate(_lines(file), 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, *rest = line.split(maxsplit=1)
            key = "".join(rest).strip()
            if len(key) < 16:
                raise ValueError(
                    f"{file}, line {number}: write NAME KEY, with a key of 16 characters or more"
                )
            digest = _digest(key)
            if digest in self._owners:
                raise ValueError(f"{file}, line {number}: this key is there twice")
            # Two keys of one name are one owner.
            self._owners[digest] = owners.setdefault(name, Owner(name))
        if file is not None and not self._owners:
            raise ValueError(f"{file} has no key")

    def owner(self, authorization: str | None) -> Owner:
        """Return whose request this is.

        Raises:
            ApiError: 401 for a missing or unknown key.
        """
        if self.open is not None:
            return self.open
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip()) if scheme.lower() == "bearer" else b""
        found = None
        # All of them, however early one fits: the time tells nothing. Digests are of one length.
        for digest, owner in self._owners.items():
            if hmac.compare_digest(digest, given):
                found = owner
        if found is None:
            raise ApiError(401, "a valid key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        return found

    def admit(self, owner: Owner) -> None:
        """Count a request.

        Raises:
            ApiError: 429 if the owner has used up what a minute allows.
        """
        now = time.monotonic()
        for what, most, lately in (
            ("requests", self.quota.requests_a_minute, owner.requests),
            ("tokens", self.quota.tokens_a_minute, owner.tokens),
        ):
            if most is not None and (wait := lately.wait(most, now)) > 0:
                raise ApiError(
                    429,
                    f"{most} {what} a minute are used up",
                    code="rate_limit_exceeded",
                    retry_after=math.ceil(wait),
                )
        if self.quota.requests_a_minute is not None:
            owner.requests.add(1, now)

    def spend(self, owner: Owner, tokens: int) -> None:
        """Count tokens that were read or written for an owner; they weigh on requests to come."""
        if self.quota.tokens_a_minute is not None and tokens:
            owner.tokens.add(tokens, time.monotonic())


def _lines(file: Path | None) -> list[str]:
    try:
        return [] if file is None else file.read_text("utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no text: write a line for each key, NAME KEY") from None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
