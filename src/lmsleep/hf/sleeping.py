"""`sleepify`: a model of `transformers` whose own `forward` and `generate` sleep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.modeling_outputs import CausalLMOutputWithPast

from lmsleep.hf.backbone import HFBackbone
from lmsleep.hf.cache_name import cache_name, named
from lmsleep.hf.card import write_card
from lmsleep.hf.dressed import Dressed, put_before
from lmsleep.hf.loading import load_pretrained
from lmsleep.hf.sharded import gathering
from lmsleep.hf.sleep_cache import SleepCache
from lmsleep.hf.sleeping_decoder import let_sleep
from lmsleep.hf.trial import adapt
from lmsleep.hf.whole_text import (
    check_alone,
    check_tokens,
    predicted_tokens,
    read_whole,
    valid_tokens,
)
from lmsleep.session import Session
from lmsleep.sleep import Hard, SleepConfig, SleepOutput
from lmsleep.trust import named_by


def sleepify(model: Any, sleep: SleepConfig) -> Any:
    """Let a causal language model of `transformers` sleep, wherever it is used.

    The object stays what it is, with its weights and its class's name, and works with `Trainer` and `peft`;
    only its `forward` reads in windows with a sleep at the end of each, and `generate` begins with a cache
    that sleeps (`SleepCache`). The configuration is kept as `model.config.sleep`, so it is saved with the
    model and `from_pretrained` finds it. Called again, it changes the configuration.

    Args:
        model: what `adapt` takes, `peft` models included.
        sleep: the `SleepConfig`. Looped wake passes are refused: they cannot read token by token. A model
            with attention alone needs an eviction that keeps something.

    Returns:
        `model`.

    Raises:
        ValueError: for a model that cannot sleep, with the reason, or a sleep that does not fit it.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = adapt(base, attention_alone=not isinstance(sleep.eviction, Hard))
    Session(backbone, sleep)  # refuses what does not fit
    decoder = base.get_decoder()
    if not isinstance(base, _Sleeping):
        if patched := [type(x).__name__ for x in (base, decoder) if "forward" in vars(x)]:
            raise ValueError(
                f"model: something has put a forward over that of {' and '.join(patched)} (hooks of "
                "accelerate for several devices, Liger, a trainer), which would be awake; sleepify the model "
                "before that"
            )
        let_sleep(decoder, backbone.layouts)
        put_before(_Sleeping, base)
        base.__dict__["own_backbone"] = backbone  # no submodule: it holds the model itself
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.cache_implementation = None  # what the folder says of a plain cache
    base.config.sleep = decoder.config.sleep = sleep.to_dict()
    return model


def from_pretrained(
    path: str | Path, sleep: SleepConfig | None = None, *, trust: bool = False, **options: Any
) -> Any:
    """Load a model that sleeps from a local folder.

    Args:
        path: folder of a model that `save_pretrained` wrote, or of any other that can sleep.
        sleep: instead of what the folder says.
        trust: run the Python file that the sleep of the folder names.
        options: as for `load_pretrained`, such as `dtype`.

    Returns:
        What `sleepify` returns.

    Raises:
        ValueError: as `load_pretrained` and `sleepify`, or if nobody says how to sleep.
        FileNotFoundError: as `load_pretrained`.
        PermissionError: if the sleep names code that may not run.
    """
    model = load_pretrained(path, **options)
    sleep = saved_sleep(model.config, path, trust=trust) if sleep is None else sleep
    if sleep is None:
        raise ValueError(
            f"{path}: its config.json has no field sleep; pass sleep=SleepConfig(window=..., passes=...)"
        )
    return sleepify(model, sleep)


def saved_sleep(config: Any, path: str | Path, *, trust: bool = False) -> SleepConfig | None:
    """Read the sleep in a configuration of `transformers`; None if it has none.

    Raises:
        ValueError: if it is damaged; names `path`.
        PermissionError: if it names code that may not run, and `trust` does not say that it may.
    """
    found = getattr(config, "sleep", None)
    if found is None:
        return None
    try:
        with named_by(Path(path) / "config.json", trust=trust):
            return SleepConfig.from_dict(found)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: the field sleep of config.json is damaged: {error}") from None


class _Sleeping(Dressed):
    """The class that `sleepify` puts before the class of a model."""

    _is_stateful = True  # transformers refuses speculation, which would have to take back what was read
    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch
    own_backbone: HFBackbone
    config: Any
    training: bool
    get_decoder: Any

    @property
    def backbone(self) -> HFBackbone:
        """The model as the sleep algorithm sees it, for `Session`, `sleep_forward` and all else."""
        held = self.own_backbone
        if held.model is not self:  # this is a replica of `nn.DataParallel`, which copies attributes
            held = self.__dict__["own_backbone"] = HFBackbone(self, held.layouts)
        return held

    @property
    def sleep(self) -> SleepConfig:
        """The way that the model sleeps."""
        return SleepConfig.from_dict(self.config.sleep)

    def new_cache(self, sessions: Sequence[Session] = ()) -> SleepCache:
        """Make a cache for `generate`.

        Args:
            sessions: rows that have read something, on `backbone`; prompts are read after it. They are read
                on: fork what should stay. Default: nothing was read.

        Raises:
            ValueError: for sessions on another model.
        """
        if any(getattr(s.model, "model", None) is not self for s in sessions):
            raise ValueError(
                "sessions were read by another model; make them with Session(model.backbone, ...)"
            )
        return SleepCache(self.backbone, self.sleep, sessions)

    @gathering
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SleepCache | None = None,
        cache: SleepCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read in windows, with a sleep at the end of each that is followed by more.

        With a cache the text is read on, without gradients, as `generate` does it. Without one it is a whole
        text, through whose windows and passes gradients flow.

        Args:
            input_ids: `[B, T]` int64.
            attention_mask: `[B, T]`, 0 for padding, on either side of a row; with a cache `[B, t]`, of which
                the last T count, and padding on the left only. Padding writes nothing and moves no window.
            position_ids: positions follow from the mask; only checked, for packed texts would share a memory.
            past_key_values: what was read before, in the name of transformers up to 5.23.
            cache: the same, in the name of transformers from 5.24 on.
            labels: `[B, T]`: `input_ids`, or -100 where a token is not to be predicted.
            use_cache: True: go on in a new cache if there is none.
            logits_to_keep: only the logits of so many last positions, or at these positions (`[n]` int64);
                0: all.
            num_items_in_batch: what the summed loss is divided by; default the number of predicted tokens.
            return_dict: False: a tuple.
            kwargs: options that are switched off.

        Returns:
            `CausalLMOutputWithPast`. In training with gradient checkpointing and labels the logits are
            None: nothing of a window is kept.

        Raises:
            ValueError: for inputs that cannot be read by windows; names the argument.
            BrokenSleep: if a sleep of a cache left NaN or infinity.
        """
        check_alone(kwargs)
        cache = past_key_values if cache is None else cache
        tokens = check_tokens(
            input_ids,
            read_on="; with a cache give all that went through it and what is new, or what is new with an "
            "attention_mask over all",
        )
        read_on = bool(cache is not None or use_cache)
        valid = valid_tokens(attention_mask, position_ids, tokens, read_on=read_on)
        kept = _kept(logits_to_keep)
        cache = self.new_cache() if use_cache and cache is None else cache
        if cache is None:
            loss, logits = self._whole(tokens, valid, labels, num_items_in_batch)
            logits = None if logits is None else logits[:, kept]
        else:
            if labels is not None:
                raise ValueError("labels need a whole text: leave out past_key_values and use_cache=True")
            if not isinstance(cache, SleepCache):
                raise ValueError(
                    f"past_key_values={type(cache).__name__} cannot sleep; use model.new_cache()"
                )
            if cache.model is not self.backbone:
                raise ValueError("past_key_values is the memory of another model; use model.new_cache()")
            # Logits are made where they are wanted alone: of a long prompt that is its last position.
            T = tokens.shape[1]
            last = min(logits_to_keep or T, T) if isinstance(logits_to_keep, int) else T
            loss, logits = None, cache.read(tokens, valid, last)[:, kept]
        out = CausalLMOutputWithPast(loss=loss, logits=logits, **named(cache))
        return out.to_tuple() if return_dict is False else out

    def _whole(
        self, tokens: Tensor, valid: Tensor | None, labels: Tensor | None, items: Tensor | int | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return loss (nats a token) and logits of whole texts."""
        wanted, targets = None, 0
        if labels is not None:
            if labels.shape != tokens.shape:
                raise ValueError(f"labels must be {[*tokens.shape]} as input_ids, got {[*labels.shape]}")
            wanted = labels != -100
            if not torch.equal(labels[wanted], tokens[wanted]):
                raise ValueError(
                    "labels must be those of input_ids, or -100: other targets are not supported"
                )
            if valid is not None and not bool(valid.any()):
                valid, wanted = None, torch.zeros_like(wanted)  # read like a text, for `_loss`
            wanted = predicted_tokens(wanted, valid)
            targets = int(wanted.sum())
        checkpoint = self.training and self.is_gradient_checkpointing
        keep = not (targets and checkpoint)
        read, logits = read_whole(
            self.backbone, tokens, valid, self.sleep, wanted=wanted, keep=keep, checkpoint=checkpoint
        )
        return None if labels is None else _loss(read, logits, targets, items), logits

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Generate as `transformers` does, in a cache that sleeps unless given one or `use_cache=False`.

        Raises:
            ValueError: as `transformers`; for another kind of cache, for logits with NaN, and for a prompt
                that ends with padding or has no token.
        """
        kind = kwargs.pop("cache_implementation", None) or getattr(
            generation_config, "cache_implementation", None
        )
        if kind is not None:
            raise ValueError(f"cache_implementation={kind!r}: a model that sleeps has a cache of its own")
        given = [kwargs.pop(name, None) for name in ("past_key_values", "cache")]
        cache = next((one for one in given if one is not None), None)
        if cache is None and kwargs.get("use_cache") is not False:
            cache, kwargs["use_cache"] = self.new_cache(), True
        kwargs |= {} if cache is None else named(cache)
        processors = [*(logits_processor or ()), _NoNaN()]
        return super().generate(inputs, generation_config, processors, *args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Prepare a step as `transformers` does, without what `generate` alone has a use for.

        Raises:
            ValueError: without a cache, for a prompt that ends with padding (a cache says so itself).
        """
        for name in (
            "tokenizer",
            "assistant_tokenizer",
        ):  # of stop strings; other models ignore what they get
            kwargs.pop(name, None)
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)  # type: ignore[misc]
        mask = inputs.get("attention_mask")
        if inputs.get(cache_name()) is None and mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(
                "attention_mask ends with padding: a prompt needs a token, and is padded on the left "
                "(tokenizer.padding_side = 'left')"
            )
        return inputs

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save as `transformers` does, with the sleep in config.json and a model card as README.md.

        A card that somebody else wrote stays.
        """
        kwargs["is_main_process"] = is_main_process
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        if is_main_process:
            write_card(Path(save_directory), self.config, self.sleep)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the activations of whole passes are recomputed in the backward pass."""
        asked: bool = self.get_decoder().is_gradient_checkpointing
        return asked

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute the activations of whole passes in the backward pass.

        Blocks are not checkpointed one by one, as other models of `transformers` do it (whose arguments
        have no use here): that drops what they carry, and nothing would be remembered.
        """
        del args, kwargs
        self.get_decoder().is_gradient_checkpointing = True

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations for the backward pass."""
        self.get_decoder().is_gradient_checkpointing = False

    gradient_checkpointing_enable = activation_checkpointing_enable
    gradient_checkpointing_disable = activation_checkpointing_disable


class _NoNaN(LogitsProcessor):
    """Lets nothing be drawn from NaN, of which greedy generation would make token 0 without a word."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if bad := scores.isnan().any(dim=-1).nonzero()[:, 0].tolist():
            raise ValueError(
                f"logits of row {', '.join(map(str, bad))} are NaN, so no token can be drawn: either "
                "attention_mask hides the whole prompt, or the model computes NaN (look at its weights)"
            )
        return scores


def _kept(logits_to_keep: int | Tensor) -> slice | Tensor:
    """Return the positions whose logits are wanted.

    Raises:
        ValueError: for what is neither a number of last positions nor positions.
    """
    if isinstance(logits_to_keep, Tensor) and logits_to_keep.ndim == 1:
        return logits_to_keep
    if isinstance(logits_to_keep, int) and logits_to_keep >= 0:
        return slice(-logits_to_keep, None)
    raise ValueError(
        f"logits_to_keep={logits_to_keep} must be how many last positions, 0 for all, or a tensor [n] of "
        "positions"
    )


def _loss(read: SleepOutput, logits: Tensor | None, targets: int, items: Tensor | int | None) -> Tensor:
    """Return the mean over predicted tokens, or their sum over `items`; zero where nothing is predicted."""
    if read.loss is None:
        # The sum of no logits: backward() works, and gives every weight a gradient of zeros, for which other
        # processes wait.
        assert logits is not None
        return logits[..., :0].sum()
    return read.loss if items is None else read.loss * (targets / items)
