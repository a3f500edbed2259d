"""A layer with fast weights to be added to a model that has none."""

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor, nn

from lmsleep.layers.jet import JetBlock
from lmsleep.layers.recall import Recall

MemoryKind = Literal["gated_delta_net", "kda", "jet"]
RULES = {"gated_delta_net": "gated_delta_rule", "kda": "kda"}  # of kinds that are a `Recall`


@dataclass(frozen=True)
class Heads:
    """The heads of an attention, as a `Recall` takes them.

    Attributes:
        num_heads: H, of keys and values.
        groups: G, queries to each.
        head_dim: K.
        bias: whether the maps to queries, keys and values have one.
        out_bias: whether the map of the output has one.
    """

    num_heads: int
    groups: int
    head_dim: int
    bias: bool = False
    out_bias: bool = False


class MemoryLayer(nn.Module):
    """`mixer(norm(h))`, to be added to `h`; zero until it is trained, so that adding it changes nothing.

    A `Recall` has the heads of the model's attention. A `JetBlock` has K = 128 (a quarter of the width in
    models narrower than 512) and V = 2 K; all its keys together are half as wide as the model.

    Args:
        d_model: width of the model.
        kind: "gated_delta_net" or "kda" (a `Recall` by that rule), or "jet" (a `JetBlock`, as the paper adds
            them to Ouro).
        norm_eps: of the norms.
        heads: of the model's attention.

    Raises:
        ValueError: for an unknown kind.
    """

    def __init__(self, d_model: int, kind: MemoryKind, norm_eps: float, heads: Heads) -> None:
        super().__init__()
        if kind not in get_args(MemoryKind):
            raise ValueError(f"kind={kind!r} is unknown; choose one of {', '.join(get_args(MemoryKind))}")
        self.norm = nn.RMSNorm(d_model, eps=norm_eps)
        self.mixer: JetBlock | Recall
        if kind == "jet":
            K = min(128, d_model // 4)
            self.mixer = JetBlock(d_model, d_model // (2 * K), K, 2 * K, norm_eps=norm_eps)
            # The last map alone is zero: it has a gradient from the first step on, and with it all before it.
            nn.init.zeros_(self.mixer.o_proj.weight)
        else:
            self.mixer = Recall(
                d_model,
                heads.num_heads,
                heads.groups,
                heads.head_dim,
                rule=RULES[kind],
                bias=heads.bias,
                out_bias=heads.out_bias,
            )

    @property
    def recalls(self) -> bool:
        """Whether it speaks only of what was slept on (`Recall`); else of all that it has read."""
        return isinstance(self.mixer, Recall)

    @property
    def conv_size(self) -> int:
        """The number of taps of the convolution."""
        return self.mixer.conv_size

    def empty_cache(self, batch_size: int) -> tuple[Tensor, ...]:
        """Return the tail of the convolution before any token."""
        return self.mixer.empty_cache(batch_size)

    def forward(
        self,
        h: Tensor,
        memory: Tensor | None,
        cache: tuple[Tensor, ...],
        recalled: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, tuple[Tensor, ...]]:
        """Map `h` `[B, T, d]`, `S` (None: zeros) and tail to what is to be added to `h`, and the next two.

        `recalled` and `valid` are those of `Recall`; a `JetBlock` takes neither.
        """
        x = self.norm(h)
        if isinstance(self.mixer, Recall):
            return self.mixer(x, memory, cache, recalled, valid)
        return self.mixer(x, memory, cache)
