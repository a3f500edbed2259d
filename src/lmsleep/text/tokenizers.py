"""Text to tokens and back: bytes, a closed list of words, a task's own, or a Hugging Face tokenizer."""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from heapq import nsmallest
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from lmsleep.foreign import read_json, reading, reason
from lmsleep.gguf_file import is_gguf, source

# Of a Hugging Face tokenizer, in a folder that may hold a model too.
FILES = (
    "tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "added_tokens.json",
    "special_tokens_map.json", "chat_template*",
)  # fmt: skip
SAMPLE = "a"  # any text, to see what a tokenizer puts before it
WORDS = 64  # of its own that are tried where it does not know that


class Tokenizer(Protocol):
    """A map from text to token numbers and back, as tasks and sessions need it."""

    @property
    def vocab_size(self) -> int:
        """The number of tokens; they are numbered 0 ... vocab_size - 1."""
        ...

    @property
    def begin(self) -> Sequence[int]:
        """What stands before the first text of a stream; often nothing."""
        ...

    @property
    def end(self) -> int | None:
        """The token that is written at the end of a text, None if there is none."""
        ...

    @property
    def ends(self) -> Collection[int]:
        """All tokens that end an answer, `end` among them."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the token numbers of a text, without markers of its beginning or end."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token numbers."""
        ...


class Bytes:
    """UTF-8 bytes, 0 ... 255."""

    vocab_size = 256
    begin, end, ends = (), None, ()

    def encode(self, text: str) -> list[int]:
        """Return the bytes of `text`."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text; what is no UTF-8 appears as escapes."""
        return bytes(tokens).decode("utf-8", "backslashreplace")


class Words:
    """A closed list of words, digits and punctuation marks, each one token; for text made from templates.

    Raises:
        ValueError: from `encode`, for a word that is not in the list.
    """

    begin, end, ends = (), None, ()
    PIECES = re.compile(r"[^\W\d_]+|\d|[^\w\s]")

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.numbers = {word: number for number, word in enumerate(self.words)}
        if len(self.numbers) != len(self.words):
            raise ValueError("words must not hold a word twice")

    @property
    def vocab_size(self) -> int:
        """The number of words, one token each."""
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Cut into words, single digits and punctuation marks; spaces are dropped."""
        try:
            return [self.numbers[piece] for piece in self.PIECES.findall(text)]
        except KeyError as error:
            raise ValueError(f"{error.args[0]!r} is not among the {len(self.words)} words") from None

    def decode(self, tokens: Sequence[int]) -> str:
        """Join the words by spaces, with punctuation and digits close up."""
        text = " ".join(self.words[token] for token in tokens)
        text = re.sub(r" ([.,;:?!])", r"\1", text)
        return re.sub(r"(?<=\d) (?=\d)", "", text)


class Spelled:
    """The vocabulary of a task, as the task spells it: `n3 n1 HOP_2`, `x4 = 7 ;`, `0110|`.

    Args:
        spell: tokens in human-readable form (`Task.spell`).
        vocab_size: its vocabulary.

    Raises:
        ValueError: from `encode`, for a word that the task has not.
    """

    begin, end, ends = (), None, ()

    def __init__(self, spell: Callable[[list[int]], str], vocab_size: int) -> None:
        self.spell, self.vocab_size = spell, vocab_size
        self.numbers = {spell([token]): token for token in range(vocab_size)}
        # A regular expression takes the first alternative that fits: HOP_1 must not win over HOP_16.
        longest_first = sorted(self.numbers, key=len, reverse=True)
        # The last alternative catches what is no word, so that the error can name it.
        self.pieces = re.compile("|".join([*map(re.escape, longest_first), r"\S+"]))

    def encode(self, text: str) -> list[int]:
        """Cut into words of the task, with or without spaces between them."""
        try:
            return [self.numbers[piece] for piece in self.pieces.findall(text)]
        except KeyError as error:
            some = " ".join([*self.numbers][:8])
            raise ValueError(f"{error.args[0]!r} is not in the task's vocabulary ({some} ...)") from None

    def decode(self, tokens: Sequence[int]) -> str:
        """Spell the tokens as the task does."""
        return self.spell(list(tokens))


class HuggingFace:
    """The tokenizer in a local folder, as `AutoTokenizer` of `transformers` reads it (the `hf` extra).

    No code of the folder is run, and nothing is asked.

    Args:
        folder: of the tokenizer, or a GGUF file (the `gguf` extra).
        model: folder of the model that it speaks for, which may know more ends of a text; default `folder`.

    Raises:
        ValueError: if the folder holds no tokenizer, damaged files, or `transformers` is not installed.
    """

    def __init__(self, folder: Path, model: Path | None = None) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise ValueError(
                f"tokenizer={str(folder)!r} needs transformers: pip install 'lmsleep[hf]'"
            ) from None
        told = f"tokenizer: {folder} holds no tokenizer that transformers can load"
        how = {"local_files_only": True, "trust_remote_code": False}
        with reading(told):
            if is_gguf(folder):
                with source(folder) as where:
                    self.tokenizer = AutoTokenizer.from_pretrained(**where, **how)
                self.tokenizer.name_or_path = str(folder)
            else:
                # With the model's config.json, where there is one: its type decides on the class.
                self.tokenizer = AutoTokenizer.from_pretrained(folder, **how)
            numbers = self.tokenizer.get_vocab()
        if not numbers:
            raise ValueError(f"{told}: it has no tokens; copy its files again")
        with reading(told):
            self.vocab_size = max(numbers.values()) + 1
            self.begin = self._begin(nsmallest(WORDS, numbers, numbers.get))
        own = self.tokenizer.eos_token_id
        self._ends = list(dict.fromkeys([*([] if own is None else [own]), *_ends(model or folder)]))

    vocab_size: int
    """The largest number of a token, added ones included, plus 1; there may be gaps."""
    begin: list[int]
    """What the tokenizer itself puts before a text: often its `bos_token`, often nothing."""

    @property
    def end(self) -> int | None:
        """The tokenizer's `eos_token`, or else the first of its tokens that the model's files name."""
        return next((token for token in self._ends if token < self.vocab_size), None)

    @property
    def ends(self) -> frozenset[int]:
        """The `eos_token`, and all that `generate` of the model's folder ends at (generation_config.json)."""
        return frozenset(self._ends)

    def encode(self, text: str) -> list[int]:
        """Encode with the tokenizer, without special tokens.

        Raises:
            ValueError: for what is no text (halves of surrogate pairs), or what it has no tokens for.
        """
        try:
            tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        except Exception as error:  # it raises bare exceptions
            raise ValueError(f"this text cannot be encoded: {reason(error)}") from None
        return tokens

    def chat(self, messages: list[dict[str, Any]]) -> str:
        """Write a conversation as the tokenizer's chat template does; raises ValueError if it has none."""
        if not self.tokenizer.chat_template:
            raise ValueError("a conversation takes a tokenizer with a chat template, and this one has none")
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode with the tokenizer, special tokens included."""
        return str(self.tokenizer.decode(list(tokens)))

    def _begin(self, words: Iterable[str]) -> list[int]:
        """See what it puts before a sample, or before one of its own `words` if it does not know that."""
        for sample in (SAMPLE, *words):
            try:
                plain, whole = self.encode(sample), list(self.tokenizer.encode(sample))
            except ValueError:
                continue
            # Looked for, not read from a field: what is added depends on classes, flags and templates.
            places = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
            # A word that is one of the marks itself stands in several places and tells nothing.
            if plain and len(places) == 1:
                return whole[: places[0]]
        return []


def _ends(folder: Path) -> list[int]:
    """Return the ends of a text that the files of a model name."""
    # As `generate` has it: config.json counts where there is no generation_config.json.
    files = [folder / name for name in ("generation_config.json", "config.json")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return []
    fields = read_json(file)
    inner = fields.get("text_config")
    found = fields.get("eos_token_id", inner.get("eos_token_id") if isinstance(inner, dict) else None)
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int for token in ends):
        raise ValueError(f"{file}: eos_token_id must be a token's number or a list of them, got {found!r}")
    return [token for token in ends if token >= 0]  # some write -1 for none


class Marks(NamedTuple):
    """The tokens that stand before an answer, and the token that ends it."""

    answer: list[int]
    end: int


def marks(tokenizer: Tokenizer, opening: str, first: int) -> Marks:
    """Return `opening` in tokens and the tokenizer's own end of a text, which a pretrained model knows.

    A tokenizer without end gets two tokens of ours, numbers `first` and `first + 1`.
    """
    if tokenizer.end is None:
        return Marks([first], first + 1)
    return Marks(tokenizer.encode(opening) or [tokenizer.end], tokenizer.end)


def begun(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode the text that a stream begins with: with `tokenizer.begin` before it, unless it stands there.

    A chat template, for one, may write it. A text without tokens stays empty.
    """
    tokens, begin = tokenizer.encode(text), [*tokenizer.begin]
    return tokens if not tokens or tokens[: len(begin)] == begin else begin + tokens


def check_tokens(tokens: Tensor, vocab_size: int, tokenizer: Tokenizer | None = None) -> None:
    """Refuse what is no row of whole numbers from 0 to `vocab_size - 1`.

    Args:
        tokens: `[n]`, of any dtype of whole numbers; any dtype if it is empty.
        vocab_size: the number of tokens that the model knows.
        tokenizer: which may know more of them, and says what they are.

    Raises:
        ValueError: naming the worst of them.
    """
    # An empty list is a tensor of floats to PyTorch, and fine.
    if tokens.ndim != 1 or (len(tokens) and (tokens.is_floating_point() or tokens.is_complex())):
        raise ValueError(f"tokens must be one row of whole numbers, got {tokens.dtype} {[*tokens.shape]}")
    if len(tokens):
        least, most = int(tokens.min()), int(tokens.max())
        if least < 0 or most >= vocab_size:
            worst = least if least < 0 else most
            told = ""
            if tokenizer is not None and 0 <= worst < tokenizer.vocab_size:
                told = f": {tokenizer.decode([worst])!r}, which this model does not know"
            raise ValueError(f"tokens must lie in 0 ... {vocab_size - 1}, got {worst}{told}")


def load_tokenizer(name: str, model: Path | None = None) -> Tokenizer:
    """Load a tokenizer: `"bytes"`, or the folder of a Hugging Face tokenizer, or a GGUF file.

    Args:
        name: of the tokenizer.
        model: folder of the model that it speaks for, if not its own.

    Raises:
        ValueError: if there is no such folder or file, or no tokenizer in it.
    """
    if name == "bytes":
        return Bytes()
    if not Path(name).is_dir() and not (is_gguf(Path(name)) and Path(name).is_file()):
        raise ValueError(f"tokenizer={name!r} is neither 'bytes' nor a folder with a tokenizer")
    return HuggingFace(Path(name), model)


def absolute(name: str) -> str:
    """Return the name under which a tokenizer can be found from any folder."""
    return name if name == "bytes" else str(Path(name).resolve())


def tokenizer_files(name: str) -> tuple[Path, ...]:
    """Return the files that tell what a tokenizer does: those of its folder without weights; else none."""
    folder = Path(name)
    if is_gguf(folder):
        return (folder,)
    if name in ("bytes", "words") or not folder.is_dir():
        return ()
    return tuple(sorted({file for kind in FILES for file in folder.glob(kind) if file.is_file()}))
