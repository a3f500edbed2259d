"""`HybridLM`: a decoder-only language model of attention and fast-weight blocks."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lmsleep.files import write_atomic
from lmsleep.layers import Attention, FastWeights, JetBlock, SwiGLU
from lmsleep.layers.in_place import Lesson, NextTokens
from lmsleep.layers.rope import turned_back
from lmsleep.models.config import RULE_OF, HybridConfig
from lmsleep.state import Cache, Memory, State
from lmsleep.trust import named_by

WRITERS = ("o_proj", "down_proj")  # linear maps into the residual stream
GATES = ("a_proj", "b_proj", "r_proj")  # of all rules


class Block(nn.Module):
    """Pre-norm residual block: a mixer that carries a state, then a SwiGLU (if it has any).

    The block's fast weights belong to the mixer, or beside attention to the SwiGLU (`trained_mlp`,
    `in_place_mlp`).
    """

    def __init__(self, config: HybridConfig, kind: str) -> None:
        super().__init__()
        c = config
        self.mixer: Attention | FastWeights | JetBlock
        if kind == "attention":
            self.mixer = Attention(
                c.d_model,
                c.num_heads,
                c.key_dim,
                num_kv_heads=c.num_kv_heads or c.num_heads,
                rope_theta=c.rope_theta,
                qk_norm=c.qk_norm,
                norm_eps=c.norm_eps,
            )
        elif kind == "jet":
            self.mixer = JetBlock(
                c.d_model,
                c.num_heads,
                c.key_dim,
                c.value_dim or c.key_dim,
                conv_size=c.conv_size,
                norm_eps=c.norm_eps,
                forget=c.forget,
                backend=c.backend,
            )
        else:
            self.mixer = FastWeights(
                c.d_model,
                c.num_heads,
                c.key_dim,
                c.value_dim or c.key_dim,
                rule=RULE_OF.get(kind, kind),
                conv_size=c.conv_size,
                conv_init=c.conv_init,
                forget=c.forget,
                negative_eigenvalues=c.negative_eigenvalues,
                norm_eps=c.norm_eps,
                backend=c.backend,
            )
        self.norm = nn.RMSNorm(c.d_model, eps=c.norm_eps)
        own: Literal["all", "down"] | None = None
        if kind == "attention" and (c.trained_mlp or c.in_place_mlp):
            own = "all" if c.trained_mlp else "down"
        self.mlp = SwiGLU(c.d_model, c.hidden_dim, own=own) if c.hidden_dim else None
        self.mlp_norm = nn.RMSNorm(c.d_model, eps=c.norm_eps) if c.hidden_dim else None

    @property
    def memory_shape(self) -> tuple[int, int, int] | None:
        """The shape `(H, K, V)` of the block's fast weights for one sequence, None if it has none."""
        own = None if self.mlp is None else self.mlp.memory_shape
        return self.mixer.memory_shape if own is None else own

    def forward(
        self,
        h: Tensor,
        memory: Tensor | None,
        cache: tuple[Tensor, ...],
        valid: Tensor | None,
        span: int | None,
        filled: Tensor | None,
        kept: tuple[Tensor, ...] = (),
        lesson: Lesson | None = None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Map `h` `[B, T, d]` and the block's own fast weights and cache to the next ones.

        With a `lesson` the SwiGLU learns the tokens, after it has read them (`in_place_mlp`).
        """
        more = {"kept": kept} if kept else {}
        mixed, memory, cache = self.mixer(self.norm(h), memory, cache, valid, span, filled, **more)
        h = h + mixed
        if self.mlp is None or self.mlp_norm is None:
            return h, memory, cache
        if lesson is None or memory is None:
            return h + self.mlp(self.mlp_norm(h), memory), memory, cache
        added, memory = self.mlp.learn(self.mlp_norm(h), memory, lesson, valid)
        return h + added, memory, cache


def _learns(block: nn.Module) -> bool:
    """Whether a block takes a `Lesson`."""
    return isinstance(block, Block) and block.mlp is not None and block.mlp.target is not None


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], said: str) -> None:
    """Load `weights`, all that `module` has and no others.

    Raises:
        ValueError: for others, beginning with what is `said` and naming the first that does not fit.
    """
    own = module.state_dict()
    for name in sorted({*own, *weights}):
        has, wanted = (tuple(t[name].shape) if name in t else None for t in (weights, own))
        if has != wanted:
            shapes = [str(list(shape)) if shape is not None else "nothing" for shape in (has, wanted)]
            raise ValueError(f"{said}: {name} is {shapes[0]} instead of {shapes[1]}")
    module.load_state_dict(dict(weights))


class HybridLM(nn.Module):
    """A hybrid language model; offers the `Backbone` protocol, so it can sleep.

    Called on tokens `[B, T]` it is a plain causal language model and returns logits `[B, T, V]`.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        # Where memory tokens begin, and the scale at which they are read: after steps of gradient descent
        # it is the learned rate of each channel, and after `rms_norm` the weight of the norm.
        m = config.memory_tokens
        self.memory_start = nn.Parameter(torch.empty(m, config.d_model)) if m else None
        self.memory_scale = nn.Parameter(torch.ones(config.d_model)) if m else None
        self.blocks = nn.ModuleList(Block(config.for_block(i), kind) for i, kind in enumerate(config.blocks))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        # Before weights are drawn: the last to draw the shared tensor is the embedding.
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw linear weights from N(0, 1/fan-in), an untied embedding from N(0, 1)."""
        for name, module in self.named_modules():
            # The gates of fast weights keep what their rule gave them: the wanted forgetting.
            if isinstance(module, nn.Linear) and not name.endswith(GATES):
                writes = name.endswith(WRITERS)
                std = module.in_features**-0.5 * (self.config.residual_init if writes else 1.0)
                nn.init.normal_(module.weight, std=std)
        # A tied embedding is the output projection too, which is to give logits of unit scale.
        std = self.config.d_model**-0.5 if self.config.tie_embeddings else 1.0
        nn.init.normal_(self.embedding.weight, std=std)
        if self.memory_start is not None:
            nn.init.normal_(self.memory_start)
        for module in self.modules():
            if isinstance(module, NextTokens):
                module.reset_parameters()

    @torch.no_grad()
    def take_weights(self, source: "HybridLM", inserted: Collection[int] = ()) -> None:
        """Copy the weights of `source`, whose blocks are those of this model without the `inserted` ones.

        What inserted blocks write into the residual stream is set to zero, so that nothing changes at first.

        Raises:
            ValueError: if the other blocks do not fit.
        """
        kept = [i for i in range(self.num_blocks) if i not in inserted]
        if len(kept) != source.num_blocks:
            raise ValueError(
                f"inserted: {self.num_blocks} blocks without {sorted(inserted)} are {len(kept)}, "
                f"but the model to start from has {source.num_blocks}"
            )
        parts = [
            (source.embedding, self.embedding),
            (source.norm, self.norm),
            (source.lm_head, self.lm_head),
            *((source.blocks[j], self.blocks[i]) for j, i in enumerate(kept)),
        ]
        for old, new in parts:
            load_weights(new, old.state_dict(), "the model to start from has other weights")
        # Of a model without them, or with another number, they begin anew.
        if self.memory_tokens == source.memory_tokens:
            for name, p in self.named_parameters(recurse=False):
                p.copy_(source.get_parameter(name))
        # With a zero map into the residual stream the block adds nothing, and still has a gradient there.
        for i in inserted:
            for name, module in self.blocks[i].named_modules():
                if name.endswith(WRITERS):
                    cast(nn.Linear, module).weight.zero_()

    @property
    def num_blocks(self) -> int:
        """The number of blocks, which a sleep may loop over."""
        return len(self.blocks)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of each block."""
        return self.config.blocks

    @property
    def vocab_size(self) -> int:
        """The number V of tokens that it reads: 0 ... V - 1."""
        return self.config.vocab_size

    @property
    def learns(self) -> bool:
        """Whether `learn` changes anything: a block has the option `in_place_mlp`."""
        return any(map(_learns, self.blocks))

    @property
    def trains(self) -> bool:
        """Whether gradient steps can train what a sequence writes: weights of feed-forward layers alone."""
        return self.config.trains

    @property
    def memory_tokens(self) -> int:
        """The number of vectors that are read before each window (`recall`)."""
        return self.config.memory_tokens

    @property
    def device(self) -> torch.device:
        """The device of its weights, on which tokens and states must lie."""
        return self.embedding.weight.device

    def initial_state(self, batch_size: int) -> State:
        """Return `S = 0` and nothing in the working memory, for `batch_size` rows.

        Memory tokens are the `S` of the first block, `[B, 1, m, d]`, and begin as a parameter says.
        """
        weight = self.embedding.weight
        blocks = [cast(Block, block) for block in self.blocks]
        # S sums up the writes of a whole stream; in half precision the small ones would round to nothing.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        memory = Memory.zeros([b.memory_shape for b in blocks], batch_size, dtype=dtype, device=weight.device)
        if self.memory_start is not None:
            first = self.memory_start.to(dtype).repeat(batch_size, 1, 1, 1)
            memory = Memory((first, *memory.layers[1:]))
        return State(memory, Cache(tuple(b.mixer.empty_cache(batch_size) for b in blocks)))

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens `[B, T]` (int64) as hidden states `h` `[B, T, d]`."""
        h: Tensor = self.embedding(tokens)
        return h

    def run(
        self,
        h: Tensor,
        state: State,
        start: int,
        stop: int,
        *,
        valid: Tensor | None = None,
        span: int | None = None,
    ) -> tuple[Tensor, State]:
        """Run blocks `start ... stop - 1` over `h` `[B, T, d]`, continuing from `state`.

        Args:
            h: hidden states.
            state: what the tokens before `h` left behind. Of its working memory each row sees the newest
                `state.cache.filled` positions; that count is not advanced here (see `State.counted`).
            start: first block.
            stop: block after the last.
            valid: `[B, T]` bool; padding (False) must follow the tokens of its row and writes nothing;
                the working memory that is returned has it before the tokens, as zeros.
            span: most positions a token attends to, itself included; None: all that are cached.
        """
        return self._run(h, state, start, stop, valid, span, None)

    def learn(
        self,
        h: Tensor,
        state: State,
        rate: float,
        *,
        valid: Tensor | None = None,
        span: int | None = None,
    ) -> tuple[Tensor, State]:
        """Run all blocks over embedded tokens `h` `[B, T, d]`; those with `in_place_mlp` learn from them.

        Each adds `rate Z^T V` to its `S` (`layers.mlp.SwiGLU`) after it was applied, so nothing that is
        computed here depends on it. All other arguments are those of `run`.
        """
        return self._run(h, state, 0, self.num_blocks, valid, span, Lesson(h, rate))

    def _run(
        self,
        h: Tensor,
        state: State,
        start: int,
        stop: int,
        valid: Tensor | None,
        span: int | None,
        lesson: Lesson | None,
    ) -> tuple[Tensor, State]:
        new, before = [], state.cache
        for i in range(start, stop):
            # A block of one's own need not know of lessons, nor of what is kept.
            told: dict[str, Any] = {"kept": before.kept[i]} if before.kept and before.kept[i] else {}
            if lesson is not None and _learns(self.blocks[i]):
                told["lesson"] = lesson
            h, memory, cache = self.blocks[i](
                h, state.memory.layers[i], before.layers[i], valid, span, before.filled, **told
            )
            new.append((memory, cache))
        return h, state.replace(start, new)

    def recall(self, memory: Memory) -> Tensor:
        """Return memory tokens as hidden states `[B, m, d]`, to be read before the tokens of a window."""
        assert self.memory_scale is not None, "a model without the option memory_tokens"
        M = cast(Tensor, memory.layers[0])[:, 0]
        return (M * self.memory_scale).to(self.embedding.weight.dtype)

    def kept_sizes(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Heads and sizes of keys and values that may be kept, for each block; None without attention."""
        mixers = [cast(Block, block).mixer for block in self.blocks]
        return tuple(
            (m.num_kv_heads, m.head_dim, m.head_dim) if isinstance(m, Attention) else None for m in mixers
        )

    def turned_back(self, i: int, keys: Tensor, by: Tensor) -> Tensor:
        """Turn keys `[B, t, H, K]` of block i back by `by` `[B, t, H]` positions."""
        mixer = cast(Attention, cast(Block, self.blocks[i]).mixer)
        return keys if mixer.rope_theta is None else turned_back(keys, by, mixer.rope_theta)

    def head(self, h: Tensor) -> Tensor:
        """Map hidden states `[B, T, d]` to logits `[B, T, V]`."""
        logits: Tensor = self.lm_head(self.norm(h))
        return logits

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits `[B, T, V]` of the plain model: one window, no sleep."""
        h, _ = self.run(self.embed(tokens), self.initial_state(len(tokens)), 0, self.num_blocks)
        return self.head(h)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `folder` (made if missing), atomically each."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        if self.config.tie_embeddings:
            # It is the embedding under another name, and safetensors refuses memory that is shared.
            del tensors["lm_head.weight"]
        # config.json comes last, so a folder that has one has its weights.
        write_atomic(folder / "model.safetensors", save(tensors, {"format": "pt"}))
        write_atomic(folder / "config.json", json.dumps(self.config.to_dict(), indent=2).encode())

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: torch.device | str = "cpu", *, trust: bool = False
    ) -> Self:
        """Load a model that `save_pretrained` wrote; `trust`: run the Python files that it names.

        Raises:
            FileNotFoundError: if the folder holds no model.
            ValueError: for a damaged file or one that belongs to another configuration.
            PermissionError: if it names code that may not run.
        """
        folder = Path(folder)
        # Named before anything is parsed: a folder of another kind gets a plain answer.
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no model: {name} is missing")
        try:
            with named_by(folder / "config.json", trust=trust):
                config = HybridConfig.from_dict(json.loads((folder / "config.json").read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / 'config.json'} is not a lmsleep model: {error}") from error
        try:
            tensors = load_file(folder / "model.safetensors", device=str(device))
        except SafetensorError as error:
            raise ValueError(f"{folder / 'model.safetensors'} is damaged or foreign: {error}") from error
        if config.tie_embeddings and "embedding.weight" in tensors:
            # The name that `save_pretrained` left out.
            tensors["lm_head.weight"] = tensors["embedding.weight"]
        model = cls(config)
        if tensors:
            model = model.to(device=device, dtype=next(iter(tensors.values())).dtype)
        load_weights(model, tensors, f"{folder} holds weights of another configuration")
        return model
