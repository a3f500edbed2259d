"""Tell models apart by a fingerprint of slow weights and configuration, read once per model object."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


def fingerprint(model: Any) -> str:
    """Return the SHA-256 over the slow weights and the configuration of a model, as 64 hex digits.

    Sleep leaves it as it is: only the fast weights change. The weights of a model object are read once, and
    again after one of them was written or replaced; a write through `.data`, which PyTorch does not count, is
    not seen.

    Args:
        model: anything with a `state_dict()`; its `config`, if it has one, counts too.

    Raises:
        ValueError: for a model without a `state_dict()`.
    """
    if not hasattr(model, "state_dict"):
        raise ValueError(f"{type(model).__name__} has no state_dict(), so a memory cannot be tied to it")
    config = json.dumps(_settings(getattr(model, "config", None)), sort_keys=True, default=_plain)
    # Sorted, for the order in which modules were added says nothing.
    weights = sorted(model.state_dict().items())
    if any(tensor.is_inference() for _, tensor in weights):  # whose writes are not counted
        return _digest_of(config, weights)
    # A weight that was replaced lies elsewhere, one that was written in place has another version.
    now = (config, tuple((name, t.data_ptr(), t._version, t.dtype, t.shape) for name, t in weights))
    before, digest = _identities.get(model, (None, ""))
    if before != now:
        digest = _digest_of(config, weights)
        _identities[model] = now, digest
    return digest


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes and numbers of weights, as 64 hex digits.

    Configurations do not count: equal weights are one model, whatever file and version they were read from.

    Args:
        weights: by name, such as a `state_dict()`.
    """
    return _digest_of("", sorted(weights.items()))


def model_identity(model: Any) -> str | None:
    """Return the fingerprint of a model; None without a `state_dict()`: nothing tells it from others."""
    return fingerprint(model) if hasattr(model, "state_dict") else None


# Of each model object: its configuration with the storage and version of its weights, and its fingerprint.
# Weak, so that a model is not kept alive by having been asked.
_identities: WeakKeyDictionary[Any, tuple[Any, str]] = WeakKeyDictionary()


def _digest_of(config: str, weights: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256(config.encode())
    for name, tensor in weights:
        # Names and shapes mark where a tensor ends: equal bytes, cut in another way, are another model.
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # As bytes, for numpy has no bfloat16; flattened, for a scalar cannot be viewed in another size.
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest.update(raw.data)
    return digest.hexdigest()


# Where a model came from and how it is used say nothing of what it is; dtypes are those of its tensors.
UNTOLD = {
    *("_name_or_path", "transformers_version", "architectures", "dtype", "use_cache", "sleep"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}


def _settings(config: Any) -> Any:
    """Return what a configuration says, without a dataclass's defaults: new options keep old memories."""
    if not is_dataclass(config) or hasattr(config, "to_diff_dict"):  # those of transformers are both
        found = config.to_dict() if hasattr(config, "to_dict") else config
        return {k: v for k, v in found.items() if k not in UNTOLD} if isinstance(found, dict) else found
    found = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if value != (f.default if f.default_factory is MISSING else f.default_factory()):
            found[f.name] = value
    return found


def _plain(value: Any) -> Any:
    """Return what JSON can say of an object: its attributes, never its address, another in every process."""
    if hasattr(value, "__qualname__"):  # a class or a function
        return value.__qualname__
    return vars(value) if hasattr(value, "__dict__") else str(value)
