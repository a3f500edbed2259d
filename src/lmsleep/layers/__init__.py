"""Layers: modules that take a state and return the next one."""

from lmsleep.layers.attention import Attention
from lmsleep.layers.fast_weights import FastWeights, Writes
from lmsleep.layers.jet import JetBlock
from lmsleep.layers.memory_layer import Heads, MemoryKind, MemoryLayer
from lmsleep.layers.mlp import SwiGLU
from lmsleep.layers.recall import Recall

__all__ = [
    "Attention",
    "FastWeights",
    "Heads",
    "JetBlock",
    "MemoryKind",
    "MemoryLayer",
    "Recall",
    "SwiGLU",
    "Writes",
]
