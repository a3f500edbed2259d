"""The kinds of backbone that runs can be trained with: one registry for training, opening and commands."""

from lmsleep.backbones.kind import Kind, Model
from lmsleep.backbones.registry import (
    BACKBONE,
    BACKBONES,
    build,
    find_kind,
    from_dict,
    kind_in,
    kind_of,
    load,
)

__all__ = [
    "BACKBONE",
    "BACKBONES",
    "Kind",
    "Model",
    "build",
    "find_kind",
    "from_dict",
    "kind_in",
    "kind_of",
    "load",
]
