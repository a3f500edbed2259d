"""What a string may hold that is no text."""


def check_characters(text: str, where: str) -> None:
    """Refuse half of a surrogate pair, which a string (and JSON) may hold and no encoding of text does.

    Raises:
        ValueError: naming `where` and the first such character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: character {error.start + 1} is half a surrogate pair ({text[error.start]!a}), no text"
        ) from None
