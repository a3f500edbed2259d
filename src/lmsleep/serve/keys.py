"""Who asks, and how much they may: bearer keys, each with a namespace of its own, and quotas."""

import hashlib
import hmac
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
class Owner:
    """Somebody with a namespace.

    Attributes:
        name: of the namespace; nothing outside of it is ever found.
        spent: what was used lately: when, and how many tokens.
    """

    name: str
    spent: deque[tuple[float, int]] = field(default_factory=deque)


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
        for number, line in enumerate([] if file is None else file.read_text().splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            name, _, key = line.strip().partition(" ")
            if len(key.strip()) < 16:
                raise ValueError(
                    f"{file}, line {number}: write NAME KEY, with a key of 16 characters or more"
                )
            digest = _digest(key.strip())
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
        while owner.spent and owner.spent[0][0] <= now - MINUTE:
            owner.spent.popleft()
        wait = int(owner.spent[0][0] + MINUTE - now) + 1 if owner.spent else 1
        requests, tokens = self.quota.requests_a_minute, self.quota.tokens_a_minute
        if requests is not None and sum(n == 0 for _, n in owner.spent) >= requests:
            raise ApiError(
                429, f"{requests} requests a minute are used up", code="rate_limit_exceeded", retry_after=wait
            )
        if tokens is not None and sum(n for _, n in owner.spent) >= tokens:
            raise ApiError(
                429, f"{tokens} tokens a minute are used up", code="rate_limit_exceeded", retry_after=wait
            )
        owner.spent.append((now, 0))

    def spend(self, owner: Owner, tokens: int) -> None:
        """Count tokens that a request has used."""
        if self.quota.tokens_a_minute is not None:
            owner.spent.append((time.monotonic(), tokens))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
