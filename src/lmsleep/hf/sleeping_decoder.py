"""The decoder of a model that sleeps: where others call it past the model, it sleeps too.

Trainers and kernels that compute a loss of their own (trl's `SFTTrainer`, Liger) put a `forward` over that
of the model and call the decoder for its hidden states. Its blocks by themselves would be awake: refused.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from lmsleep.hf.backbone import HFBackbone, Layout
from lmsleep.hf.cache import RunCache
from lmsleep.hf.cache_name import cache_name
from lmsleep.hf.dressed import Dressed, put_before
from lmsleep.hf.sharded import gathering
from lmsleep.hf.whole_text import check_alone, check_tokens, read_whole, valid_tokens
from lmsleep.sleep import SleepConfig


class SleepingDecoder(Dressed):
    """The class that `sleepify` puts before the class of a decoder.

    Attributes:
        layouts: what each of its blocks carries.
        is_gradient_checkpointing: recompute the activations of passes in the backward pass.
    """

    layouts: tuple[Layout, ...]
    is_gradient_checkpointing = False
    config: Any
    training: bool

    @gathering
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read whole texts in windows, with a sleep at the end of each that is followed by more.

        Arguments and errors are those of the model's own `forward` without a cache and without labels.

        Returns:
            `BaseModelOutputWithPast`: `last_hidden_state` `[B, T, d]` of the wake passes, from which the head
            makes the logits of the model.

        Raises:
            ValueError: also for a cache, and for a sleep that depends on where the loss is.
        """
        check_alone({**kwargs, "use_cache": use_cache})
        tokens = check_tokens(input_ids)
        valid = valid_tokens(attention_mask, position_ids, tokens)
        sleep = SleepConfig.from_dict(self.config.sleep)
        if not sleep.sleep_on_loss:
            raise ValueError("sleep_on_loss=False: a decoder is not told where the loss is; call the model")
        checkpoint = self.training and self.is_gradient_checkpointing
        _, said = read_whole(_Headless(self, self.layouts), tokens, valid, sleep, checkpoint=checkpoint)
        out = BaseModelOutputWithPast(last_hidden_state=said)
        return out.to_tuple() if return_dict is False else out


class _Headless(HFBackbone):
    def head(self, h: Tensor) -> Tensor:
        return self.normed(h)


def let_sleep(decoder: Any, layouts: Sequence[Layout]) -> None:
    """Make a decoder sleep as `decoder.config.sleep` says, and let its blocks run in no other way."""
    put_before(SleepingDecoder, decoder)
    decoder.layouts = tuple(layouts)
    for block in decoder.layers:
        block.register_forward_pre_hook(_refuse_awake, with_kwargs=True)


def _refuse_awake(block: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    if not isinstance(options.get(cache_name()), RunCache):
        raise ValueError(
            f"{type(block).__name__}: something calls the blocks of a model that sleeps past its forward, "
            "where they would be awake; let it call the model or its decoder (without a forward put over it)"
        )
