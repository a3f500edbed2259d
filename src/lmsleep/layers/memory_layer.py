"""A layer with fast weights to be added to a model that has none."""

from typing import Literal, get_args

from torch import Tensor, nn

from lmsleep.layers.fast_weights import FastWeights
from lmsleep.layers.jet import JetBlock

MemoryKind = Literal["jet", "gated_delta_net"]


class MemoryLayer(nn.Module):
    """`mixer(norm(h))`, to be added to `h`; zero until it is trained, so that adding it changes nothing.

    Heads have K = 128 (a quarter of the width in models narrower than 512) and V = 2 K; all keys together are
    half as wide as the model.

    Args:
        d_model: width of the model.
        kind: "jet" (a `JetBlock`) or "gated_delta_net" (`FastWeights`).
        norm_eps: of the norms.

    Raises:
        ValueError: for an unknown kind.
    """

    conv_size = 4

    def __init__(self, d_model: int, kind: MemoryKind, norm_eps: float) -> None:
        super().__init__()
        if kind not in get_args(MemoryKind):
            raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(get_args(MemoryKind))}")
        K = min(128, d_model // 4)
        H, V = d_model // (2 * K), 2 * K
        self.norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.mixer: JetBlock | FastWeights
        if kind == "jet":
            self.mixer = JetBlock(d_model, H, K, V, conv_size=self.conv_size, norm_eps=norm_eps)
        else:
            self.mixer = FastWeights(
                d_model,
                H,
                K,
                V,
                rule="gated_delta_rule",
                conv_size=self.conv_size,
                conv_init=0.0,
                forget=(0.001, 0.1),
                negative_eigenvalues=False,
                norm_eps=norm_eps,
                backend="auto",
            )
        # The last map alone is zero: it has a gradient from the first step on, and with it all before it.
        nn.init.zeros_(self.mixer.o_proj.weight)

    def empty_cache(self, batch_size: int) -> tuple[Tensor, ...]:
        """Return the tail of the convolution before any token."""
        return self.mixer.empty_cache(batch_size)

    def forward(
        self, h: Tensor, memory: Tensor | None, cache: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Map `h` `[B, T, d]`, `S` (None: zeros) and tail to what is to be added to `h`, and the next two."""
        x = self.norm(h)
        if isinstance(self.mixer, FastWeights):
            return self.mixer(x, memory, cache, valid=None, span=None)
        return self.mixer(x, memory, cache)
