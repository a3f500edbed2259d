"""The architecture of a hybrid decoder as plain data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Self, get_args

from lmsleep.ops import RULES, Backend, find_rule
from lmsleep.plain import check_values
from lmsleep.plugins import absolute

BlockKind = str  # one of LAYERS, a key of RULE_OF, or the name of an update rule (ops.find_rule)
LAYERS = ("attention", "jet")  # kinds that are no update rule in the usual layer
RULE_OF = {"gated_delta_net": "gated_delta_rule", "gated_linear": "gated_linear_rule"}


@dataclass(frozen=True, kw_only=True)
class HybridConfig:
    """A decoder of attention and fast-weight blocks in any order.

    Every option from `num_heads` on may differ per block: `overrides={1: {"mlp_dim": 0}}` gives
    block 1 no feed-forward layer.
    """

    vocab_size: int = 256
    """Tokens in the vocabulary."""
    d_model: int = 256
    """Width of the residual stream."""
    blocks: tuple[BlockKind, ...] = ("attention", "gated_delta_net", "attention", "gated_delta_net")
    """Kind of each block, first to last: attention, gated_delta_net, jet, gated_linear, kda, raven or a rule
    of your own, FILE.py:NAME."""
    tie_embeddings: bool = False
    """Use the embedding as output projection too."""
    norm_eps: float = 1e-6
    """Epsilon of every RMS norm."""
    residual_init: float = 1.0
    """Initial scale of the projections into the residual stream, in units of 1/sqrt(fan-in)."""
    memory_tokens: int = 0
    """Vectors that are read before each window, for the consolidators memory-tokens and gradmem to write; in
    models of attention without other fast weights. 0: none."""
    num_heads: int = 4
    """Heads of attention and of fast weights."""
    head_dim: int | None = None
    """Size of a query, key (and attention value) head; default d_model / num_heads."""
    value_dim: int | None = None
    """Size of a fast-weight value head; default head_dim."""
    num_kv_heads: int | None = None
    """Key-value heads of attention (grouped queries); default num_heads."""
    mlp_dim: int | None = None
    """Hidden size of the SwiGLU after the mixer; default 8/3 d_model rounded up to 8, 0 for none."""
    trained_mlp: bool = False
    """Attention blocks: each sequence trains the SwiGLU for itself, by the consolidator gradient-steps."""
    in_place_mlp: bool = False
    """Attention blocks: each sequence adds a matrix of its own to the last one of the SwiGLU, which the
    consolidator in-place writes."""
    conv_size: int = 4
    """Taps of the short convolution in fast-weight blocks; 0 for none (jet: at least 1, the kernel of which
    each token makes for itself)."""
    conv_init: float = 0.0
    """Weight of its older taps at the start, where that of the current token is 1; 0: the identity."""
    rope_theta: float | None = 10_000.0
    """Base of the rotary positions; None for attention without positions."""
    qk_norm: bool = False
    """RMS-normalise queries and keys of attention."""
    forget: tuple[float, float] = (0.001, 0.1)
    """Log decay per token at initialisation, slowest and fastest head (kda: channel of every head)."""
    negative_eigenvalues: bool = False
    """Let the write strength beta reach 2 instead of 1 (state transitions may reflect)."""
    backend: Backend = "auto"
    """Implementation of the recurrence: auto, reference, chunked or fla."""
    overrides: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    """Options of single blocks, by block number."""

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("blocks must name at least one block")
        # A rule in FILE.py must be found again from another folder: by a worker, after --resume.
        object.__setattr__(self, "blocks", tuple(map(absolute, self.blocks)))
        for kind in {*self.blocks} - {*LAYERS, *RULE_OF, *RULES}:
            try:
                find_rule(kind)
            except ValueError as error:
                raise ValueError(
                    f"blocks: {kind!r} is unknown ({error}); or {', '.join((*LAYERS, *RULE_OF))}"
                ) from error
        for name in ("vocab_size", "d_model", "num_heads", "head_dim", "value_dim", "num_kv_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("mlp_dim", "conv_size", "conv_init", "residual_init", "memory_tokens"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):  # so written, it refuses NaN as well
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.backend not in get_args(Backend):
            raise ValueError(
                f"backend={self.backend!r} is unknown; choose from {', '.join(get_args(Backend))}"
            )
        if self.head_dim is None and self.d_model % self.num_heads:
            raise ValueError(
                f"d_model={self.d_model} is not a multiple of num_heads={self.num_heads}; set head_dim"
            )
        # Each key-value head serves a whole group of queries.
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        for name in ("trained_mlp", "in_place_mlp"):
            if getattr(self, name) and not self.hidden_dim:
                raise ValueError(f"{name} needs a feed-forward layer, got mlp_dim=0")
        if self.trained_mlp and self.in_place_mlp:
            raise ValueError("trained_mlp and in_place_mlp are two ways of changing one layer: choose one")
        if self.memory_tokens and ({*self.blocks} != {"attention"} or self.trained_mlp or self.in_place_mlp):
            raise ValueError(
                f"memory_tokens={self.memory_tokens} is for models that keep nothing else: attention blocks "
                "alone, without trained_mlp and in_place_mlp"
            )
        # Rotary positions turn pairs of numbers.
        if "attention" in self.blocks and self.rope_theta is not None and self.key_dim % 2:
            raise ValueError(
                f"head_dim={self.key_dim} must be even for rotary positions (or rope_theta None)"
            )
        if len(self.forget) != 2 or not 0 < self.forget[0] <= self.forget[1]:
            raise ValueError(
                f"forget must be (slowest, fastest) with 0 < slowest <= fastest, got {self.forget}"
            )
        # What all blocks share cannot differ in one.
        shared = {"vocab_size", "d_model", "blocks", "tie_embeddings", "residual_init"}
        shared |= {"memory_tokens", "overrides"}
        known = {f.name for f in fields(self)} - shared
        for i, options in self.overrides.items():
            if not 0 <= i < len(self.blocks):
                raise ValueError(f"overrides: there is no block {i}, only 0 ... {len(self.blocks) - 1}")
            if unknown := set(options) - known:
                raise ValueError(f"overrides of block {i}: unknown option {', '.join(sorted(unknown))}")
            try:
                # Each block's options are checked by the same rules as the whole.
                self.for_block(i)
            except ValueError as error:
                raise ValueError(f"overrides of block {i}: {error}") from error
        if self.blocks == ("jet",) and not self.overrides:
            self._check_jet()
            return
        for i, kind in enumerate(self.blocks):
            if kind == "jet":
                try:
                    self.for_block(i)
                except ValueError as error:
                    raise ValueError(f"{error}; block {i} is one, and overrides say it for others") from error

    def _check_jet(self) -> None:
        """Refuse what a Jet block does not have."""
        if not self.conv_size:
            raise ValueError("conv_size=0: blocks of the kind jet need a convolution, 1 at least")
        for name, usual in (("negative_eigenvalues", False), ("conv_init", 0.0)):
            if getattr(self, name) != usual:
                raise ValueError(f"{name}={getattr(self, name)}: blocks of the kind jet do not have it")

    def for_block(self, i: int) -> "HybridConfig":
        """Return the options in force in block `i`."""
        # Without the overrides, which would be checked again for every block of every block.
        return replace(self, blocks=(self.blocks[i],), overrides={}, **self.overrides.get(i, {}))

    @property
    def learns(self) -> bool:
        """Whether any block has a feed-forward layer that learns what it reads (`in_place_mlp`)."""
        return any(
            kind == "attention" and self.for_block(i).in_place_mlp for i, kind in enumerate(self.blocks)
        )

    @property
    def trains(self) -> bool:
        """Whether all that a sequence writes are weights of feed-forward layers (of `trained_mlp`, say)."""
        own = map(self.for_block, range(len(self.blocks)))
        return {*self.blocks} == {"attention"} and any(one.trained_mlp or one.in_place_mlp for one in own)

    @property
    def key_dim(self) -> int:
        """The size of a query or key head."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """The hidden size of the SwiGLU, 0 for none."""
        # Three matrices of 8/3 d have the parameters of a plain MLP's two of 4 d; multiples of 8 suit
        # hardware.
        return -(-self.d_model * 8 // 3 // 8) * 8 if self.mlp_dim is None else self.mlp_dim

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form, which `from_dict` reads back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Rebuild a configuration from what `to_dict` returned, also after a trip through JSON.

        Raises:
            ValueError: for an unknown or invalid field.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a model configuration is a mapping, got {type(data).__name__}")
        names = {f.name for f in fields(cls)}
        if unknown := set(data) - names:
            raise ValueError(f"unknown field {', '.join(sorted(unknown))} in the model configuration")
        data = dict(data)
        # JSON has neither tuples nor numbers as keys.
        overrides = data.pop("overrides", {})
        if not isinstance(overrides, Mapping) or not all(isinstance(o, Mapping) for o in overrides.values()):
            raise ValueError(f"overrides must be options by the number of a block, got {overrides!r:.80}")
        options = _tuples(data)
        check_values(cls, options)
        options["overrides"] = {int(i): _tuples(o) for i, o in overrides.items()}
        for some in options["overrides"].values():
            check_values(cls, {name: value for name, value in some.items() if name in names})
        return cls(**options)


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
