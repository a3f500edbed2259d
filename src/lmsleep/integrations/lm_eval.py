"""Models that sleep in lm-eval (EleutherAI's evaluation harness), as its model type `lmsleep`.

`python -m lmsleep.integrations.lm_eval` is lm-eval's own command with that type known to it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, takewhile
from pathlib import Path
from typing import Any, Self

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from torch import Tensor

from lmsleep import shipped
from lmsleep.foreign import reading
from lmsleep.hf import from_pretrained
from lmsleep.hf.adapter import whole
from lmsleep.integrations.batches import MOST, Batches
from lmsleep.integrations.generation import seeds, writing
from lmsleep.memory import model_identity
from lmsleep.session import Session, SessionBatch
from lmsleep.text.tokenizers import HuggingFace, begun

# Arguments of the model type.
SIZES, SLEEP = ("batch_size", "max_batch_size"), ("window", "passes")
KNOWN = ("pretrained", "tokenizer", *SLEEP, *SIZES, "device")

Scored = tuple[Any, list[int], list[int]]  # what lm-eval hands on: the texts, their tokens


@register_model("lmsleep")
class SleepLM(TemplateLM):  # type: ignore[misc]
    """A model type of lm-eval that sleeps at the end of each window, so no context is truncated.

    Choices that follow the same context are scored on forks of one memory.

    Args:
        session: has read nothing, with a tokenizer; each request is answered by a fork of it.
        batch_size: contexts that are read together, or "auto" (see `Batches`).
        max_batch_size: where "auto" begins.
        progress: show a bar.

    Raises:
        ValueError: for a batch size that is none.
    """

    def __init__(
        self,
        session: Session,
        *,
        batch_size: int | str = 1,
        max_batch_size: int = MOST,
        progress: bool = False,
    ) -> None:
        super().__init__()
        assert session.tokenizer is not None
        self.session, self.words = session, session.tokenizer
        self.batches = Batches(batch_size, most=max_batch_size, progress=progress)
        # lm-eval itself reads `tokenizer`, and expects one of transformers or None.
        self.tokenizer = self.words.tokenizer if isinstance(self.words, HuggingFace) else None

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> Self:
        """Make it from lm-eval's arguments.

        They are `pretrained` (a folder, an adapter, a GGUF file or a shipped name), `tokenizer` (a folder),
        `window`, `passes`, `batch_size`, `max_batch_size` and `device`.

        Raises:
            ValueError: as `lmsleep.hf.from_pretrained`, or for an argument that is unknown or missing.
        """
        given = {**(additional_config or {}), **arg_dict}
        # Refused, not ignored: a misspelt `passes` would be evaluated with the folder's own.
        if unknown := given.keys() - {*KNOWN}:
            raise ValueError(
                f"model_args: the model type lmsleep does not know {', '.join(sorted(unknown))}; it has "
                f"{', '.join(KNOWN)}"
            )
        if "pretrained" not in given:
            raise ValueError("model_args: pretrained is missing; it names the folder of the model")
        # lm-eval hands on what was not given as None.
        sizes = {name: given[name] for name in SIZES if given.get(name) is not None}
        Batches(sizes.get("batch_size", 1), most=sizes.get("max_batch_size", MOST))  # refused before loading
        # Of an adapter, that of its base.
        words = HuggingFace(Path(given.get("tokenizer") or whole(shipped.find(given["pretrained"]))))
        model = from_pretrained(given["pretrained"])
        if given.get("device"):
            model = model.to(given["device"])
        sleep = replace(model.sleep, **{name: given[name] for name in SLEEP if name in given})
        # history=0: requests are answered by forks, and nothing is ever taken back.
        return cls(Session(model.backbone, sleep, words, history=0), **sizes)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> Self:
        """Make it as `create_from_arg_obj` does, from `pretrained=FOLDER,passes=4`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context: a BOS, or an end of text if there is none."""
        begin, bos = [*self.words.begin], getattr(self.tokenizer, "bos_token_id", None)
        return begin[-1] if begin else self.eot_token_id if bos is None else bos

    @property
    def _before(self) -> list[int]:
        """What is read before a text without context, or its first token could not be predicted."""
        return [*self.words.begin] or [self.prefix_token_id]

    @property
    def eot_token_id(self) -> int:
        """The end of a text, or else a line end."""
        if self.words.end is not None:
            return self.words.end
        line = self.words.encode("\n")
        if not line:
            raise ValueError(
                "the tokenizer has no end of text, which must stand before a text without context"
            )
        return line[0]

    @property
    def tokenizer_name(self) -> str:
        """The name or place of the tokenizer, without slashes."""
        return str(getattr(self.tokenizer, "name_or_path", type(self.words).__name__)).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encode a text, with what the tokenizer puts before one unless `add_special_tokens` is False."""
        return self.words.encode(string) if add_special_tokens is False else begun(self.words, string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a chat with the template of the tokenizer.

        Raises:
            ValueError: if it has no template, or one that fails.
        """
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError("the model's tokenizer has no chat template; leave out --apply-chat-template")
        with reading("the chat template of the model's tokenizer"):
            text: str = self.tokenizer.apply_chat_template(  # type: ignore[union-attr]
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        return text

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take lm-eval's cache of answers (`use_cache`).

        It knows requests, but no models and no sleeps, and would answer with those of another.

        Raises:
            ValueError: for a cache that another model has filled, or this one with another sleep.
        """
        held = cache_hook.dbdict
        if held is not None:
            own = json.dumps([model_identity(self.session.model), self.session.sleep_config.to_dict()])
            if held.get("lmsleep", own) != own or (len(held) and "lmsleep" not in held):
                raise ValueError(
                    f"use_cache: {held.filename} holds answers of another model or another sleep; name "
                    "another file, one for each of them"
                )
            held["lmsleep"] = own
        super().set_cache_hook(cache_hook)

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood in nats of each text after its context, and if it is the likeliest there.

        The tokens are those of context and text together. Where the tokenizer merges the end of the context
        with the text, the merged token is scored.

        Raises:
            ValueError: for a text that has no token, or logits with NaN.
        """
        return self._loglikelihood_tokens([(r.args, *self._encode_pair(*r.args)) for r in requests])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        # A space belongs to the word after it, as tokenizers have it.
        before = context.rstrip()
        text = context[len(before) :] + continuation
        if before:
            whole, read = self.tok_encode(before + text), self.tok_encode(before)
            # Tokens that both begin with: what is merged across the border is in neither.
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, read, strict=False)))
        else:
            whole, same = self.tok_encode(text, add_special_tokens=False), 0
        if len(whole) == same:
            raise ValueError(
                f"the tokenizer makes no token of {continuation!r} after {context[-40:]!r}, so there is "
                "nothing to score"
            )
        if same:
            return whole[:same], whole[same:]
        # Something must predict the first token. A text may bring its own.
        if whole[0] == self.prefix_token_id and len(whole) > 1:
            return whole[:1], whole[1:]
        return self._before, whole

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # Choices of one question follow the same context, which is then read once.
        by_context = sorted(range(len(requests)), key=lambda i: requests[i][1])
        groups = [[*same] for _, same in groupby(by_context, key=lambda i: requests[i][1])]

        def answer(some: Sequence[list[int]]) -> list[tuple[float, bool]]:
            return self._scored([[requests[i] for i in same] for same in some])

        scores = self.batches.answered(groups, "loglikelihood", answer)
        # In the order of the requests, whatever order was read in.
        found = dict(zip(by_context, scores, strict=True))
        return [found[i] for i in range(len(requests))]

    def _scored(self, groups: Sequence[Sequence[Scored]]) -> list[tuple[float, bool]]:
        """Score requests, those of a group on forks of the context that they share."""
        # A fork shares the state, which is never written in place: it costs nothing.
        readers = [self.session.fork() for _ in groups]
        # All but the last token of the context, whose logits predict the first of the choice.
        SessionBatch(readers).read([same[0][1][:-1] for same in groups])
        # One fork for each choice; a choice must not see the ones before it.
        forks = [reader.fork() for reader, same in zip(readers, groups, strict=True) for _ in same]
        # The last context token, then the choice without its last token, which predicts nothing scored.
        which = [request for same in groups for request in same]
        asked = [[*context[-1:], *choice[:-1]] for _, context, choice in which]
        found = []
        for (texts, _, choice), logits in zip(
            which, SessionBatch(forks).read_with_logits(asked), strict=True
        ):
            found.append(_score(logits, torch.tensor(choice)))
            self.cache_hook.add_partial("loglikelihood", texts, found[-1])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood in nats of each whole text after `prefix_token_id`, however long it is.

        Raises:
            ValueError: for logits with NaN.
        """

        def answer(some: Sequence[Instance]) -> list[float]:
            found = []
            for request in some:
                reader = self.session.fork()
                reader.read(self._before)
                text = self.tok_encode(request.args[0], add_special_tokens=False)
                found.append(_known(reader.score(text)))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
            return found

        return self.batches.answered(requests, "loglikelihood_rolling", answer)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Write answers up to what ends them, sleeping on what is read and written.

        What is drawn goes by torch's seed: the same with the same, and another draw where lm-eval repeats a
        request. Special tokens are left out of the answers.

        Raises:
            ValueError: for a setting of the generation that has no counterpart, or logits with NaN.
        """
        drawn = seeds([request.args for request in requests])
        # Rows that are written together share their options, of which those of the first hold for all.
        by_options = sorted(range(len(requests)), key=lambda i: repr(requests[i].args[1]))
        groups = [[*same] for _, same in groupby(by_options, key=lambda i: repr(requests[i].args[1]))]
        # All of them first: what is refused should not cost the answers before it.
        options = [writing(requests[same[0]].args[1]) for same in groups]
        found: dict[int, str] = {}
        for same, how in zip(groups, options, strict=True):
            write = partial(self._written, how)
            asked = [(requests[i].args, drawn[i]) for i in same]
            found.update(zip(same, self.batches.answered(asked, "generate_until", write), strict=True))
        return [found[i] for i in range(len(requests))]

    def _written(self, how: dict[str, Any], asked: Sequence[tuple[Any, int]]) -> list[str]:
        """Answer prompts, each with its seed, by `how`."""
        batch = SessionBatch([self.session.fork() for _ in asked])
        # Generation goes on from logits, so something must be read even of an empty prompt.
        prompts = [self.tok_encode(texts[0]) or self._before for texts, _ in asked]
        written = batch.generate(prompts, seeds=[seed for _, seed in asked], **how)
        found = [self._plain(str(answer)) for answer in written]
        for (texts, _), answer in zip(asked, found, strict=True):
            self.cache_hook.add_partial("generate_until", texts, answer)
        return found

    def _plain(self, answer: str) -> str:
        # As text, after it was cut: what ends an answer may be the text of a special token.
        for special in getattr(self.tokenizer, "all_special_tokens", ()):
            answer = answer.replace(special, "")
        return answer


def _score(logits: Tensor, wanted: Tensor) -> tuple[float, bool]:
    """Return the log-likelihood in nats of tokens `[t]` by logits `[t, V]`, and if each was the likeliest."""
    # Sums of many log-probabilities in bfloat16 would not rank close choices.
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).cpu()
    likeliest = bool((log_p.argmax(-1) == wanted).all())
    return _known(float(log_p.gather(1, wanted[:, None]).sum())), likeliest


def _known(score: float) -> float:
    """Return a log-likelihood that is one. Of several NaN, lm-eval would choose the first."""
    if math.isnan(score):
        raise ValueError("logits are NaN, so nothing can be scored by what the open window holds")
    return score


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
