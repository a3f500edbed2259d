"""The name of the cache argument: `past_key_values` in transformers up to 5.23, `cache` from 5.24 on."""

from functools import cache
from typing import Any


@cache
def cache_name() -> str:
    """Return the name by which models, blocks, masks and outputs of this transformers call their cache."""
    from transformers.modeling_outputs import CausalLMOutputWithPast  # not before a model is there anyway

    return "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def named(given: Any) -> dict[str, Any]:
    """Return a cache as a keyword argument of this transformers."""
    return {cache_name(): given}
