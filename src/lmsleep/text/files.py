"""Files of text: what is in them, whatever they are packed and encoded in."""

import bz2
import codecs
import gzip
import io
import lzma
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lmsleep.text.tokenizers import Bytes, Tokenizer, begun

HEAD = 4096  # bytes at the beginning of a file that tell its format
UNPACKED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, UnicodeDecodeError)
# Marks of the byte order. UTF-32 goes first: in little-endian order its mark begins with that of UTF-16.
MARKED = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
TABLE, PACKED, DOCUMENT, BINARY = (
    "its rows are read as --data of lmsleep train text, finetune and eval",
    "unpack it first",
    "save its text in UTF-8",
    "give it text",
)
FORMATS = {  # what a file begins with: what it is, and what to do about it
    b"PAR1": ("Parquet", TABLE),
    b"ARROW1": ("Arrow", TABLE),
    b"\xff\xff\xff\xff": ("an Arrow stream", TABLE),
    b"ORC": ("ORC", "save its rows as JSON lines"),
    b"Obj\x01": ("Avro", "save its rows as JSON lines"),
    b"SQLite format 3\x00": ("an SQLite database", "save its rows as JSON lines"),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", PACKED),
    b"\x04\x22\x4d\x18": ("packed by lz4", PACKED),
    b"\x1f\x9d": ("packed by compress", PACKED),
    b"PK\x03\x04": ("a zip archive (or what is kept in one: .docx, .epub, .npz ...)", PACKED),
    b"PK\x05\x06": ("an empty zip archive", PACKED),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", PACKED),
    b"Rar!\x1a\x07": ("a rar archive", PACKED),
    b"%PDF-": ("a PDF", DOCUMENT),
    b"{\\rtf": ("RTF", DOCUMENT),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("a document of Microsoft Office", DOCUMENT),
    b"\x93NUMPY": ("an array of numpy", BINARY),
    b"\x89HDF\r\n\x1a\n": ("HDF5", BINARY),
    b"GGUF": ("GGUF", BINARY),
    b"version https://git-lfs": ("a pointer of Git LFS", "fetch the file itself (git lfs pull)"),
    b"\x80\x02": ("a pickle", BINARY),
    b"\x80\x04\x95": ("a pickle", BINARY),
    b"\x80\x05\x95": ("a pickle", BINARY),
    b"\x89PNG\r\n\x1a\n": ("a picture", BINARY),
    b"\xff\xd8\xff": ("a picture", BINARY),
    b"GIF8": ("a picture", BINARY),
    b"\x7fELF": ("a program", BINARY),
}
TAR = slice(257, 262)  # where a tar archive says what it is
NULS = 0.2  # of all even, or of all odd bytes: more than text has, and less than UTF-16 has of most languages


@contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Open a file for the bytes of its text: unpacked (gzip, bzip2, xz), in UTF-8 and without mark.

    A mark at the beginning tells UTF-16 and UTF-32, which become UTF-8; bytes without one stay as they are.

    Raises:
        OSError: if there is no such file.
        ValueError: naming the file, if it is of a known format that is no text, or is damaged.
    """
    with path.open("rb") as file:
        mode = path.stat().st_mode
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise ValueError(f"{path} is a device, not a file")
        try:
            # A pipe cannot be looked into and then read from its beginning.
            yield _text(file if file.seekable() else io.BytesIO(file.read()), path)
        except DAMAGED as error:
            raise ValueError(f"{path} is damaged: {error}") from None


def read_text(path: Path) -> bytes:
    """Return the bytes of the text in a file; see `open_text`."""
    with open_text(path) as file:
        return file.read()


def to_tokens(text: bytes, tokenizer: Tokenizer, path: Path, *, first: bool = False) -> np.ndarray:
    """Return the tokens `[n]` of the text in the file at `path`: uint8 of `Bytes`, otherwise int32.

    Before a text that comes `first` in a stream stands what the tokenizer puts there.

    Raises:
        ValueError: naming the file, for text that is not UTF-8 (but `Bytes` takes it), or refused words.
    """
    if isinstance(tokenizer, Bytes):
        return np.frombuffer(text, dtype=np.uint8)
    try:
        return encoded(text.decode(), tokenizer, first=first)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}), which a tokenizer needs") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def encoded(text: str, tokenizer: Tokenizer, *, first: bool) -> np.ndarray:
    """Return the tokens `[n]` of a text, as `to_tokens` does of that of a file."""
    tokens = begun(tokenizer, text) if first else tokenizer.encode(text)
    # Said, for of an empty list numpy would make floats.
    return np.array(tokens, dtype=np.uint8 if isinstance(tokenizer, Bytes) else np.int32)


def _text(file: BinaryIO, path: Path) -> BinaryIO:
    """Return the text in an open file, from its beginning."""
    head = file.read(HEAD)
    file.seek(0)
    for magic, unpack in UNPACKED.items():
        if head.startswith(magic):
            # Again: what was packed may be an archive, or in UTF-16.
            return _text(unpack(file), path)
    for mark, encoding in MARKED.items():
        if head.startswith(mark):
            return io.BytesIO(file.read().decode(encoding).encode())
    for magic, (what, remedy) in FORMATS.items():
        if head.startswith(magic):
            raise ValueError(f"{path} is {what}, not text; {remedy}")
    if head[TAR] == b"ustar":
        raise ValueError(f"{path} is a tar archive, not text; {PACKED}")
    if any(len(half) and half.count(0) / len(half) > NULS for half in (head[::2], head[1::2])):
        raise ValueError(
            f"{path} holds as many zeros as UTF-16 without a mark of the byte order, or as no text; "
            "save it in UTF-8"
        )
    file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
    return file
