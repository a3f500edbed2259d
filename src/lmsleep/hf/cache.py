"""The cache that decoder blocks of `transformers` see while they run; a `State` goes in and comes out.

`transformers` writes recurrent states and convolution tails in place and ties them to the cache of a whole
generation. Here they are values: a run takes tensors, its blocks read and replace them through the methods
they know (`update`, `update_conv_state`, `update_recurrent_state`), and the run hands back new ones.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmsleep.ops import append


@dataclass(eq=False)
class Carried:
    """The state that one layer of `transformers` carries over a call.

    Attributes:
        keys: `[B, t, H, K]` as the layer caches them (rotated, or latent), None if it has none.
        values: `[B, t, H, V]`.
        tail: the last inputs of its short convolution, `[B, t, C]`.
        S: its fast weights, three dimensions a row.
        recalled: what a layer reads that recalls what was slept on: `S` as the window began.
        kept: keys and values of earlier windows, as above; they are seen, and stay where they are.
    """

    keys: Tensor | None = None
    values: Tensor | None = None
    tail: Tensor | None = None
    S: Tensor | None = None
    recalled: Tensor | None = None
    kept: tuple[Tensor, ...] = ()


class _Lent(Tensor):
    """`S` in the hands of a layer. One-token kernels overwrite it; what they write is kept beside it."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    written: Tensor | None = None

    def copy_(self, src: Tensor, non_blocking: bool = False) -> Tensor:
        self.written = src
        return self


class RunCache:
    """The cache that stands in for `transformers.Cache` during one call of blocks.

    What layers begin with stays what it is, so a block may be run again, as where its activations are
    recomputed.

    Args:
        carried: what each layer begins with, by its `layer_idx`.
        valid: `[B, T]` bool, False for padding at the end of a row, which layers of ours alone are shown;
            None: there is none.
        sliding: the window slides: no token is one that it begins with.
    """

    def __init__(
        self, carried: dict[int, Carried], valid: Tensor | None = None, *, sliding: bool = False
    ) -> None:
        self._carried, self.valid, self.sliding = carried, valid, sliding
        self._left = {layer_idx: replace(one) for layer_idx, one in carried.items()}
        self._lent: dict[int, _Lent] = {}

    def begun(self, layer_idx: int) -> Carried:
        """Return what a layer began with."""
        return self._carried.get(layer_idx, Carried())

    def left(self, layer_idx: int) -> Carried:
        """Return what a layer leaves, to be written to."""
        return self._left.setdefault(layer_idx, Carried())

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add keys and values `[B, H, T, D]` of new tokens; return those of all visible tokens."""
        layer, left = self.begun(layer_idx), self.left(layer_idx)
        # `transformers` has heads before time, a State has time first (dimension 1).
        keys, values = key_states.transpose(1, 2), value_states.transpose(1, 2)
        if layer.keys is not None and layer.values is not None:
            keys, values = append(layer.keys, keys), append(layer.values, values)
        left.keys, left.values = keys, values
        if layer.kept:
            keys, values = (torch.cat(pair, dim=1) for pair in zip(layer.kept, (keys, values), strict=True))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Return nothing: then even one token goes through `update_conv_state`, which writes no tensor."""
        return

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Put inputs `[B, C, T]` of new tokens behind those that the convolution still sees.

        Raises:
            ValueError: for a layer that does not say how wide its convolution is.
        """
        if conv_kernel_size is None or state_idx:
            raise ValueError(f"layer {layer_idx} keeps its convolution in a way that is not known")
        tail = self.begun(layer_idx).tail
        if tail is not None and tail.shape[1]:
            conv_states = torch.cat([tail.mT.to(conv_states.dtype), conv_states], dim=2)
        seen = conv_states.mT
        # A convolution of W taps sees the W - 1 inputs before a token.
        self.left(layer_idx).tail = seen[:, max(seen.shape[1] - (conv_kernel_size - 1), 0) :]
        return conv_states

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Lend the layer its `S`, a copy that it may overwrite; None before its shape is known."""
        S = self.begun(layer_idx).S
        if S is None:
            return None
        # A copy, since other passes and forks hold the same tensor; a subclass, since some kernels overwrite
        # it.
        lent = self._lent[layer_idx] = S.clone().as_subclass(_Lent)
        return lent

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        """Take the new `S` of the layer."""
        self._lent.pop(layer_idx, None)
        self.left(layer_idx).S = recurrent_states
        return recurrent_states

    def is_recording_past(self, layer_idx: int) -> bool:
        """Return False: nothing here is rolled back."""
        return False

    def finished(self) -> dict[int, Carried]:
        """Return what each layer carries after the call."""
        for layer_idx, lent in self._lent.items():
            self.left(layer_idx).S = lent.as_subclass(Tensor) if lent.written is None else lent.written
        return self._left


def through_cache(mixer: Any, x: Tensor, cache: Any, layer_idx: int, valid: Tensor | None) -> Any:
    """Run a layer that takes and returns its state as a layer of `transformers`, which keeps it in a cache.

    Args:
        mixer: called as `mixer(x, S, (tail,))`, returns `(y, S, (tail,))`; one that `recalls`, as
            `mixer(x, S, (tail,), recalled, valid)`, with the padding of a `RunCache`.
        x: `[B, T, d]`.
        cache: a `RunCache`, a cache of `transformers` with a linear-attention layer, or None for none.
        layer_idx: the place in the cache.
        valid: `[B, T]`, zero or False for padding, which is read as zeros. In front of a text it changes
            nothing, for `S` is zero there.

    Returns:
        y.

    Raises:
        ValueError: for padding after others were remembered: the memory would forget on it.
    """
    S, tail = _carried(cache, layer_idx)
    if valid is not None:
        if S is not None:
            raise ValueError(
                "attention_mask hides tokens that follow on others: the memory would forget on this padding; "
                "pad in front of the first token, or pass rows of equal length"
            )
        x = x * valid[..., None].to(x.dtype)
    tails = mixer.empty_cache(len(x)) if tail is None else (tail,)
    if isinstance(cache, RunCache) and getattr(mixer, "recalls", False):
        recalled = None
        if not cache.sliding:
            recalled = cache.begun(layer_idx).recalled
            recalled = x.new_zeros(len(x), *mixer.mixer.memory_shape) if recalled is None else recalled
            cache.left(layer_idx).recalled = recalled
        y, S, (tail,) = mixer(x, S, tails, recalled, cache.valid)
    else:
        y, S, (tail,) = mixer(x, S, tails)
    if isinstance(cache, RunCache):
        cache.left(layer_idx).tail = tail
        cache.update_recurrent_state(S, layer_idx)
    elif cache is not None:
        cache.update_conv_state(tail.mT, layer_idx, conv_kernel_size=mixer.conv_size)
        cache.update_recurrent_state(S, layer_idx)
    return y


def _carried(cache: Any, layer_idx: int) -> tuple[Tensor | None, Tensor | None]:
    """Return `S` and tail of a layer, None before its first token."""
    if cache is None:
        return None, None
    if isinstance(cache, RunCache):
        return cache.begun(layer_idx).S, cache.begun(layer_idx).tail
    tail = cache.get_conv_state(layer_idx)
    return cache.get_recurrent_state(layer_idx), None if tail is None else tail.mT


def cache_layers(config: Any) -> list[Any]:
    """Make the layers of a new cache of `transformers`: those of the blocks, then those of memory layers."""
    from transformers import DynamicCache
    from transformers.cache_utils import LinearAttentionLayer

    inserted = getattr(config, "memory_layers", None) or {"after": ()}
    return [*DynamicCache(config=config).layers, *(LinearAttentionLayer() for _ in inserted["after"])]
