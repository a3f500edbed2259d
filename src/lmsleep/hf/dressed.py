"""Put a class before that of an object which exists already, so that copies and pickles know it again."""

from functools import cache
from typing import Any


class Dressed:
    """A class to be put before another, whose name, module and attributes the result keeps."""

    own: type[Any]
    dress: type[Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Say how to make the object again: the class is found by its two parts, for it has no module."""
        return _empty, (self.dress, self.own), self.__getstate__()


def put_before(dress: Any, module: Any) -> None:
    """Let `module` be of a class that looks in `dress` first, then in the class that it has."""
    own: Any = type(module)
    module.__class__ = _joined(dress, own)


@cache  # so that models of one family stay of one class
def _joined(dress: Any, own: Any) -> Any:
    names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(own.__name__, (dress, own), {**names, "own": own, "dress": dress})


def _empty(dress: Any, own: Any) -> Any:
    joined = _joined(dress, own)
    return joined.__new__(joined)
