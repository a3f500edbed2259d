"""What several servers keep together: the rows and memory files of every owner, at an address of fsspec.

One server at a time holds an owner. Another one takes over by writing its name, and reads what is there: the
store of a server is then a copy, which may be lost with it.
"""

import base64
import json
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lmsleep.serve.errors import ApiError

Cell = str | bytes | int | float | None
# Tables of the store, each after those that its rows refer to.
ORDER = ("starts", "streams", "things", "unread")
PARTIAL = ".partial"


class Moved(ApiError):
    """Another server holds this owner now: whoever asks again finds it."""

    def __init__(self) -> None:
        said = "another server has taken over what belongs to this key; ask again"
        super().__init__(503, said, code="moved", retry_after=1)


class Change(NamedTuple):
    """A row as it is now.

    Attributes:
        table: its table.
        owner: whose it is.
        key: its name.
        cells: all of it; None: it is gone.
    """

    table: str
    owner: str
    key: str
    cells: tuple[Cell, ...] | None


class Shared:
    """Rows and files of all owners, on any file system that fsspec knows. For any threads.

    A row is an object, and so is a file. Nothing is changed in place, and what is there is whole.

    Args:
        url: `file:///mnt/lmsleep`, `s3://bucket/lmsleep`, ...
        about: what all servers must have in common: the model, and how it sleeps.

    Raises:
        ValueError: for an address of a kind that fsspec does not know or lacks a package for, or that belongs
            to another model.
        OSError: if it cannot be reached.
    """

    def __init__(self, url: str, about: dict[str, str]) -> None:
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ValueError(f"shared={url} cannot be used: {error}") from None
        self._root, self._me = root.rstrip("/"), secrets.token_hex(8)
        said, place = json.dumps(about), f"{self._root}/about"
        if (found := self._read(place)) is None:
            self._write(place, said.encode())
        elif found.decode() != said:
            raise ValueError(f"shared={url} belongs to {found.decode()}, not {said}; name another address")

    def holds(self, owner: str) -> bool:
        """Say whether this server is the one that holds an owner."""
        return self._read(f"{self._place(owner)}/holder") == self._me.encode()

    def hold(self, owner: str) -> None:
        """Take an owner over."""
        self._write(f"{self._place(owner)}/holder", self._me.encode())

    def check(self, owner: str) -> None:
        """Make sure that this server holds an owner.

        Raises:
            Moved: if another one does.
        """
        if not self.holds(owner):
            raise Moved

    def changes(self, owner: str) -> Iterator[Change]:
        """Yield all rows of an owner, each after those that it refers to."""
        place = f"{self._place(owner)}/rows/"
        self._files.invalidate_cache()  # another server has written since
        names = [path.rpartition(place)[2].split("/") for path in self._files.find(place)]
        found = [name for name in names if not name[-1].endswith(PARTIAL)]
        for table, key in sorted(found, key=lambda name: ORDER.index(name[0])):
            cells = json.loads(self._files.cat_file(f"{place}{table}/{key}"))
            yield Change(table, owner, key, tuple(map(_cell, cells)))

    def write(self, changes: Iterable[Change], file: Callable[[str], Path]) -> None:
        """Write rows, each after what it refers to, `file(key)` with each start; then remove what is gone.

        Raises:
            Moved: if another server has taken one of the owners over.
            OSError: if it cannot be written.
        """
        by_owner = sorted((c for c in changes if c.owner), key=lambda change: change.owner)
        for owner, several in groupby(by_owner, key=lambda change: change.owner):
            changed = sorted(several, key=lambda change: ORDER.index(change.table))
            if all(change.cells is None for change in changed) and not self.holds(owner):
                continue  # a copy that nobody asks for any more makes room
            self.check(owner)
            place = self._place(owner)
            for table, _, key, cells in changed:
                if cells is None:
                    continue
                if table == "starts" and not self._files.exists(f"{place}/files/{key}"):
                    self._write(f"{place}/files/{key}", file(key).read_bytes())
                self._write(f"{place}/rows/{table}/{key}", json.dumps([*map(_json, cells)]).encode())
            for table, _, key, cells in reversed(changed):
                if cells is None:
                    self._remove(f"{place}/rows/{table}/{key}")
                    if table == "starts":
                        self._remove(f"{place}/files/{key}")
            # Once more: who took over before now may have read too early to see all of it.
            self.check(owner)

    def fetch(self, owner: str, key: str) -> bytes:
        """Return the memory file of a start.

        Raises:
            FileNotFoundError: if there is none.
        """
        content: bytes = self._files.cat_file(f"{self._place(owner)}/files/{key}")
        return content

    def _place(self, owner: str) -> str:
        # A name may hold what no path can.
        return f"{self._root}/{sha256(owner.encode()).hexdigest()}"

    def _read(self, path: str) -> bytes | None:
        try:
            content: bytes = self._files.cat_file(path)
        except FileNotFoundError:
            return None
        return content

    def _write(self, path: str, content: bytes) -> None:
        self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
        if isinstance(self._files, LocalFileSystem):  # stores of objects write all or nothing by themselves
            partial = f"{path}.{secrets.token_hex(4)}{PARTIAL}"
            self._files.pipe_file(partial, content)
            self._files.mv(partial, path)
        else:
            self._files.pipe_file(path, content)

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._files.rm_file(path)


def _json(cell: Cell) -> Any:
    return {"bytes": base64.b64encode(cell).decode()} if isinstance(cell, bytes) else cell


def _cell(said: Any) -> Cell:
    return base64.b64decode(said["bytes"]) if isinstance(said, dict) else said
