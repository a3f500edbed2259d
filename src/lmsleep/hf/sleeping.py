"""`sleepify`: a model of `transformers` whose own `forward` and `generate` sleep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from lmsleep.hf.backbone import HFBackbone
from lmsleep.hf.cache_name import named
from lmsleep.hf.card import write_card
from lmsleep.hf.loading import load_pretrained
from lmsleep.hf.sleep_cache import SleepCache
from lmsleep.hf.trial import adapt
from lmsleep.session import Session
from lmsleep.sleep import SleepConfig, SleepOutput, sleep_forward
from lmsleep.trust import named_by


def sleepify(model: Any, sleep: SleepConfig) -> Any:
    """Let a causal language model of `transformers` sleep, wherever it is used.

    The object stays what it is, with its weights and its class's name, and works with `Trainer` and `peft`;
    only its `forward` reads in windows with a sleep at the end of each, and `generate` begins with a cache
    that sleeps (`SleepCache`). The configuration is kept as `model.config.sleep`, so it is saved with the
    model and `from_pretrained` finds it. Called again, it changes the configuration.

    Args:
        model: what `adapt` takes, `peft` models included.
        sleep: the `SleepConfig`. Looped wake passes are refused: they cannot read token by token.

    Returns:
        `model`.

    Raises:
        ValueError: for a model that cannot sleep, with the reason, or a sleep that does not fit it.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = base.backbone if isinstance(base, _Sleeping) else adapt(base)
    Session(backbone, sleep)  # refuses what does not fit
    base.config.sleep = sleep.to_dict()
    if not isinstance(base, _Sleeping):
        own = type(base)
        names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
        base.__class__ = type(own.__name__, (_Sleeping, own), names)
        base.__dict__["backbone"] = backbone  # no submodule: it holds the model itself
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


class _Sleeping:
    """The class that `sleepify` puts before the class of a model.

    Attributes:
        backbone: the model as the sleep algorithm sees it, for `Session`, `sleep_forward` and all else.
    """

    _is_stateful = True  # transformers refuses speculation, which would have to take back what was read
    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch
    backbone: HFBackbone
    config: Any
    training: bool

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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SleepCache | None = None,
        cache: SleepCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
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
            logits_to_keep: only the logits of so many last positions; 0: all.
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
        if refused := [name for name, value in kwargs.items() if value is not None and value is not False]:
            raise ValueError(f"{', '.join(refused)}: a model that sleeps reads input_ids alone; leave it out")
        if input_ids is None or input_ids.ndim != 2 or not input_ids.shape[1]:
            raise ValueError(
                "input_ids must hold new tokens, [B, T]; with a cache give all that went through it and what "
                "is new, or what is new with an attention_mask over all"
            )
        valid = _valid(attention_mask, position_ids, input_ids)
        cache = past_key_values if cache is None else cache
        cache = self.new_cache() if use_cache and cache is None else cache
        if cache is None:
            loss, logits = self._whole(input_ids, valid, labels, num_items_in_batch)
            logits = None if logits is None else logits[:, -logits_to_keep:]
        else:
            if labels is not None:
                raise ValueError("labels need a whole text: leave out past_key_values and use_cache=True")
            if not isinstance(cache, SleepCache):
                raise ValueError(
                    f"past_key_values={type(cache).__name__} cannot sleep; use model.new_cache()"
                )
            if cache.model is not self.backbone:
                raise ValueError("past_key_values is the memory of another model; use model.new_cache()")
            loss, logits = None, cache.read(input_ids, valid, logits_to_keep or input_ids.shape[1])
        out = CausalLMOutputWithPast(loss=loss, logits=logits, **named(cache))
        return out.to_tuple() if return_dict is False else out

    def _whole(
        self, tokens: Tensor, valid: Tensor | None, labels: Tensor | None, items: Tensor | int | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return loss (nats a token) and logits of whole texts."""
        sleep, wanted, lengths, turned = self.sleep, None, None, None
        if labels is not None:
            wanted = labels != -100
            if not torch.equal(labels[wanted], tokens[wanted]):
                raise ValueError(
                    "labels must be those of input_ids, or -100: other targets are not supported"
                )
        if valid is not None:  # rows begin with their first token, so that padding moves no window
            lengths = valid.sum(dim=1)
            # Each row is turned round until its first token stands first; logits are turned back below.
            T, first = valid.shape[1], valid.int().argmax(dim=1)
            turned = (torch.arange(T, device=valid.device) + first[:, None]) % T
            tokens, wanted = tokens.gather(1, turned), None if wanted is None else wanted.gather(1, turned)
        checkpoint = self.training and self.is_gradient_checkpointing
        keep = labels is None or not checkpoint
        read = sleep_forward(
            self.backbone, tokens, wanted, sleep, lengths=lengths, return_logits=keep, checkpoint=checkpoint
        )
        logits = read.logits
        if logits is not None and turned is not None:
            logits = logits.gather(1, turned.argsort(1)[..., None].expand_as(logits))
        return None if wanted is None else _loss(read, wanted, lengths, items), logits

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as `transformers` does, in a cache that sleeps unless given one or `use_cache=False`."""
        given = [kwargs.pop(name, None) for name in ("past_key_values", "cache")]
        cache = next((one for one in given if one is not None), None)
        if cache is None and kwargs.get("use_cache") is not False:
            cache, kwargs["use_cache"] = self.new_cache(), True
        kwargs |= {} if cache is None else named(cache)
        return super().generate(*args, **kwargs)  # type: ignore[misc]

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

    is_gradient_checkpointing = False

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute the activations of whole passes in the backward pass.

        Blocks are not checkpointed one by one, as other models of `transformers` do it (whose arguments
        have no use here): that drops what they carry, and nothing would be remembered.
        """
        del args, kwargs
        self.is_gradient_checkpointing = True

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations for the backward pass."""
        self.is_gradient_checkpointing = False

    gradient_checkpointing_enable = activation_checkpointing_enable
    gradient_checkpointing_disable = activation_checkpointing_disable


def _valid(mask: Tensor | None, position_ids: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Return a mask `[B, T]`, bool, False for padding; None if there is none."""
    B, T = tokens.shape
    if mask is not None:
        if mask.ndim != 2 or len(mask) != B or mask.shape[1] < T:
            raise ValueError(f"attention_mask must be [B, T] = [{B}, {T}] or longer, got {[*mask.shape]}")
        mask = mask[:, -T:].bool()
        if bool((mask[:, 1:] & ~mask[:, :-1]).sum(1).add(mask[:, 0]).gt(1).any()):
            raise ValueError("attention_mask has padding among the tokens of a row; pad before or after them")
    if position_ids is not None:
        steps = position_ids.diff(dim=-1) == 1
        if mask is not None:
            steps = steps | ~(mask[:, 1:] & mask[:, :-1])
        if not bool(steps.all()):
            raise ValueError(
                "position_ids start again within a row: packed texts would share a memory; give each a row"
            )
    return None if mask is None or bool(mask.all()) else mask


def _loss(read: SleepOutput, wanted: Tensor, lengths: Tensor | None, items: Tensor | int | None) -> Tensor:
    """Return the mean over predicted tokens, or their sum over `items`; zero where nothing is predicted."""
    if read.loss is None:
        # A zero that depends on the weights: backward() works on a batch without targets.
        written = [t.sum() for t in read.memory.tensors()]
        return torch.stack(written).sum() * 0.0
    if items is None:
        return read.loss
    predicted = wanted[:, 1:]
    if lengths is not None:
        predicted = predicted & (torch.arange(1, wanted.shape[1], device=wanted.device) < lengths[:, None])
    return read.loss * (predicted.sum() / items)
