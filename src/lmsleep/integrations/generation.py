"""Translate what tasks of lm-eval say of answers into arguments of `SessionBatch.generate`."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.models.utils import normalize_gen_kwargs

from lmsleep.session.sampling import Sampling

LONGEST = 256  # tokens of an answer where a task does not say
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Settings of other model types that sessions have not, each with the value that switches it off.
OFF = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "typical_p": 1,
    "min_p": 0,
}


def writing(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `SessionBatch.generate` for a task's `generation_kwargs`.

    Raises:
        ValueError: for a setting that has no counterpart, or a value that is none.
    """
    # None says as little as a setting that is left out.
    checked = {name: _checked(name, value) for name, value in given.items() if value is not None}
    if checked.get("do_sample"):
        checked.setdefault("temperature", 1.0)
    # lm-eval's own words: max_new_tokens is max_gen_toks, a temperature alone means sampling.
    options = dict(normalize_gen_kwargs(checked, LONGEST))
    # Taken out one by one: what is left over at the end is what has no counterpart.
    made = {"stop": [*options.pop("until"), *_texts("stop", options.pop("stop", []))]}
    made["max_new_tokens"] = options.pop("max_gen_toks")
    drawn = options.pop("do_sample")
    how = {name: options.pop(name) for name in ("temperature", "top_p", "top_k") if name in options}
    if unknown := [f"{name}={value}" for name, value in options.items() if OFF.get(name) != value]:
        raise ValueError(
            f"generation_kwargs: a model that sleeps does not know {', '.join(sorted(unknown))}; "
            "it has until, max_gen_toks, do_sample, temperature, top_p, top_k"
        )
    if not drawn:  # `generate` is greedy by default
        return made
    if how.get("top_k") in (0, -1):  # all tokens, in transformers and in vLLM
        del how["top_k"]
    try:
        Sampling(**how)
    except ValueError as error:
        raise ValueError(f"generation_kwargs: {error}") from None
    return {**made, **how}


def _checked(name: str, value: Any) -> Any:
    """Return a value as what its setting takes; as a text "false" would be true."""
    wanted = ""
    if name in ("until", "stop"):
        return _texts(name, value)
    if name == "do_sample" and not isinstance(value, bool):
        wanted = "true or false"
    if name in ("temperature", "top_p") and not _number(value):
        wanted = "a number"
    if name == "top_k" and not (_number(value) and value == int(value)):
        wanted = "a whole number"
    if name in LENGTHS and not (_number(value) and value == int(value) >= 1):
        wanted = "a whole number from 1"
    if wanted:
        raise ValueError(f"generation_kwargs: {name} must be {wanted}, got {value!r}")
    return int(value) if name == "top_k" else value


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _texts(name: str, value: Any) -> list[str]:
    texts = list(value) if isinstance(value, list | tuple) else [value]
    if strange := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"generation_kwargs: {name} must be texts, got {strange[0]!r}")
    return texts


def seeds(requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[int]:
    """Return a seed of the draws for each request, by torch's seed, which is that of lm-eval.

    A request that is repeated is drawn anew each time (`repeats`). What stands beside it, in which order and
    in which batch, changes nothing.
    """
    times = Counter[str]()
    found = []
    for request in requests:
        asked = json.dumps([torch.initial_seed(), *request], sort_keys=True, default=repr)
        digest = hashlib.sha256(f"{asked} {times[asked]}".encode()).digest()
        times[asked] += 1
        # 63 bits: what a generator of torch takes without a sign.
        found.append(int.from_bytes(digest[:8], "big") >> 1)
    return found
