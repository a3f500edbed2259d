"""Models that sleep in lm-eval (EleutherAI's evaluation harness), as its model type `lmsleep`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from torch import Tensor
from tqdm import tqdm

from lmsleep.foreign import reading
from lmsleep.hf import from_pretrained
from lmsleep.session import Session, SessionBatch
from lmsleep.text.tokenizers import HuggingFace, begun

LONGEST = 256  # tokens of an answer where a task does not say
DRAWN = ("temperature", "top_p", "top_k")

Scored = tuple[Any, list[int], list[int]]  # what lm-eval hands on: the texts, their tokens


@register_model("lmsleep")
class SleepLM(TemplateLM):  # type: ignore[misc]
    """A model type of lm-eval that sleeps at the end of each window, so no context is truncated.

    Choices that follow the same context are scored on forks of one memory.

    Args:
        session: has read nothing, with a tokenizer; each request is answered by a fork of it.
        batch_size: contexts that are read together.
        progress: show a bar.
    """

    def __init__(self, session: Session, *, batch_size: int = 1, progress: bool = False) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        assert session.tokenizer is not None
        self.session, self.words, self.batch_size = session, session.tokenizer, batch_size
        self.progress = progress
        # lm-eval itself reads `tokenizer`, and expects one of transformers or None.
        self.tokenizer = self.words.tokenizer if isinstance(self.words, HuggingFace) else None

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> Self:
        """Make it from lm-eval's arguments: `pretrained` (a local folder), `window` and `passes`.

        Raises:
            ValueError: as `lmsleep.hf.from_pretrained`, or for an argument that is unknown or missing.
        """
        given = {**(additional_config or {}), **arg_dict}
        # Refused, not ignored: a misspelt `passes` would be evaluated with the folder's own.
        if unknown := set(given) - {
            "pretrained",
            "window",
            "passes",
            "batch_size",
            "max_batch_size",
            "device",
        }:
            raise ValueError(f"model_args: the model type lmsleep does not know {', '.join(sorted(unknown))}")
        if "pretrained" not in given:
            raise ValueError("model_args: pretrained is missing; it names the folder of the model")
        model = from_pretrained(given["pretrained"])
        if given.get("device"):
            model = model.to(given["device"])
        sleep = replace(model.sleep, **{k: given[k] for k in ("window", "passes") if k in given})
        # history=0: requests are answered by forks, and nothing is ever taken back.
        session = Session(model.backbone, sleep, HuggingFace(Path(given["pretrained"])), history=0)
        return cls(session, batch_size=int(given.get("batch_size") or 1))

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

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scores: dict[int, tuple[float, bool]] = {}
        # Choices of one question follow the same context, which is then read once.
        by_context = sorted(range(len(requests)), key=lambda i: requests[i][1])
        groups = [list(same) for _, same in groupby(by_context, key=lambda i: requests[i][1])]
        for some in self._batches(groups, "loglikelihood"):
            # A fork shares the state, which is never written in place: it costs nothing.
            readers = [self.session.fork() for _ in some]
            # All but the last token of the context, whose logits predict the first of the choice.
            SessionBatch(readers).read([requests[same[0]][1][:-1] for same in some])
            # One fork for each choice; a choice must not see the ones before it.
            forks = [reader.fork() for reader, same in zip(readers, some, strict=True) for _ in same]
            which = [i for same in some for i in same]
            # The last context token, then the choice without its last token, which predicts nothing scored.
            asked = [[*requests[i][1][-1:], *requests[i][2][:-1]] for i in which]
            for i, logits in zip(which, SessionBatch(forks).read_with_logits(asked), strict=True):
                scores[i] = _score(logits, torch.tensor(requests[i][2]))
        # In the order of the requests: lm-eval's cache and its answers go by it, whatever order was read in.
        for i, (texts, _, _) in enumerate(requests):
            self.cache_hook.add_partial("loglikelihood", texts, scores[i])
        return [scores[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood in nats of each whole text after its prefix, however long it is."""
        found = []
        for some in self._batches(requests, "loglikelihood_rolling"):
            for request in some:
                reader = self.session.fork()
                # Without a token before it, the first token of the text could not be predicted.
                reader.read([*self.words.begin] or [self.prefix_token_id])
                found.append(reader.score(self.tok_encode(request.args[0], add_special_tokens=False)))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Write answers up to what ends them, sleeping on what is read and written."""
        answers: dict[int, str] = {}
        # Rows that are written together share their options.
        by_options = sorted(range(len(requests)), key=lambda i: repr(requests[i].args[1]))
        for _, same in groupby(by_options, key=lambda i: repr(requests[i].args[1])):
            for some in self._batches(list(same), "generate_until"):
                # Those of the first hold for all of the group.
                options = self._writing(requests[some[0]].args[1])
                batch = SessionBatch([self.session.fork() for _ in some])
                # Generation goes on from logits, so something must be read even of an empty prompt.
                prompts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in some]
                for i, answer in zip(some, batch.generate(prompts, **options), strict=True):
                    answers[i] = str(answer)
                    self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return [answers[i] for i in range(len(requests))]

    def _writing(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Translate a task's arguments into those of `SessionBatch.generate`.

        Raises:
            ValueError: for one that has no counterpart.
        """
        options = dict(given)
        until = options.pop("until", None) or []
        stop: list[str | int] = [until] if isinstance(until, str) else list(until)
        # Taken out one by one: what is left over at the end is what has no counterpart.
        made = {"stop": stop, "max_new_tokens": int(options.pop("max_gen_toks", LONGEST))}
        drawn = options.pop("do_sample", bool(options.get("temperature")))
        found = {name: options.pop(name) for name in DRAWN if name in options}
        if options:
            raise ValueError(
                f"generation_kwargs: a model that sleeps does not know {', '.join(sorted(options))}"
            )
        # Without sampling none of them is handed on: `generate` is greedy by default.
        return {**made, **({"temperature": 1.0, **found} if drawn else {})}

    def _batches(self, items: Sequence[Any], what: str) -> Iterator[Sequence[Any]]:
        with tqdm(total=len(items), desc=what, disable=None if self.progress else True, leave=False) as bar:
            for a in range(0, len(items), self.batch_size):
                some = items[a : a + self.batch_size]
                yield some
                bar.update(len(some))


def _score(logits: Tensor, wanted: Tensor) -> tuple[float, bool]:
    """Return the log-likelihood in nats of tokens `[t]` by logits `[t, V]`, and if each was the likeliest."""
    # Sums of many log-probabilities in bfloat16 would not rank close choices.
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).cpu()
    return float(log_p.gather(1, wanted[:, None]).sum()), bool((log_p.argmax(-1) == wanted).all())
