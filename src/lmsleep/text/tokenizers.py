"""Text to tokens and back: bytes, a closed list of words, a task's own, or a Hugging Face tokenizer."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

# Of a Hugging Face tokenizer, in a folder that may hold a model too.
FILES = (
    "tokenizer*", "vocab*", "merges*", "*.model", "*.tiktoken", "added_tokens.json",
    "special_tokens_map.json", "chat_template*",
)  # fmt: skip


class Tokenizer(Protocol):
    """A map from text to token numbers and back, as tasks and sessions need it."""

    @property
    def vocab_size(self) -> int:
        """The number of tokens; they are numbered 0 ... vocab_size - 1."""
        ...

    @property
    def end(self) -> int | None:
        """The token that ends a text, None if there is none."""
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
    end = None

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

    end = None
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

    end = None

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
    """The tokenizer in a local folder, as `transformers` saves it (the `hf` extra).

    Raises:
        ValueError: if the folder holds no tokenizer, or `transformers` is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import AutoTokenizer, PreTrainedConfig
        except ImportError:
            raise ValueError(
                f"tokenizer={str(folder)!r} needs transformers: pip install 'lmsleep[hf]'"
            ) from None
        # A tokenizer that names its class loads without the model's config.json, whose type may be unknown.
        config = PreTrainedConfig() if _names_its_class(folder) else None
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, config=config
            )
        except Exception as error:  # it raises whatever its many formats raise
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"tokenizer: {folder} holds no tokenizer that transformers can load: {reason}"
            ) from None

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""
        return len(self.tokenizer)

    @property
    def end(self) -> int | None:
        """The tokenizer's `eos_token`."""
        token: int | None = self.tokenizer.eos_token_id
        return token

    def encode(self, text: str) -> list[int]:
        """Encode with the tokenizer, without special tokens."""
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return tokens

    def chat(self, messages: list[dict[str, Any]]) -> str:
        """Write a conversation as the tokenizer's chat template does; raises ValueError if it has none."""
        if not self.tokenizer.chat_template:
            raise ValueError("a conversation takes a tokenizer with a chat template, and this one has none")
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode with the tokenizer, special tokens included."""
        return str(self.tokenizer.decode(list(tokens)))


def _names_its_class(folder: Path) -> bool:
    try:
        return "tokenizer_class" in json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return False


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


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer: `"bytes"`, or the folder of a Hugging Face tokenizer.

    Raises:
        ValueError: if there is no such folder, or no tokenizer in it.
    """
    if name == "bytes":
        return Bytes()
    if not Path(name).is_dir():
        raise ValueError(f"tokenizer={name!r} is neither 'bytes' nor a folder with a tokenizer")
    return HuggingFace(Path(name))


def absolute(name: str) -> str:
    """Return the name under which a tokenizer can be found from any folder."""
    return name if name == "bytes" else str(Path(name).resolve())


def tokenizer_files(name: str) -> tuple[Path, ...]:
    """Return the files that tell what a tokenizer does: those of its folder without weights; else none."""
    folder = Path(name)
    if name in ("bytes", "words") or not folder.is_dir():
        return ()
    return tuple(sorted({file for kind in FILES for file in folder.glob(kind) if file.is_file()}))
