"""What a model has beyond its base, in as few numbers as asked for."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmsleep.hf.adapter import DOWN, UP, changed
from lmsleep.hf.lora import check_plain, factors, is_adapted


@dataclass(frozen=True)
class Difference:
    """What a model has beyond its base.

    Attributes:
        tensors: by name, whole or as factors, on the CPU.
        inherits: which tensor of the base a new one is a change of.
        lost: the largest share of what was learned of a tensor (its distance from that of the base, or from
            zero) that few factors and digits left out.
        worst: the tensor of which that is.
    """

    tensors: dict[str, Tensor]
    inherits: dict[str, str]
    lost: float
    worst: str


@torch.no_grad()
def difference(model: Any, base: Any, *, rank: int | None, dtype: torch.dtype) -> Difference:
    """Find what a model has beyond its base: tensors that are new, others, or have an adapter beside them.

    Args:
        model: what was trained; adapters of `peft` need not be merged.
        base: the model that it was made from.
        rank: of the changes of matrices that have no adapter, by singular values, wherever that takes fewer
            numbers; new ones are changes of the base's matrix of their kind (`q_proj`, say) that is nearest.
            None: they are whole.
        dtype: of factors, and of new matrices; vectors, and whole tensors of the base, stay in theirs.

    Raises:
        ValueError: if the model was not made from that base, or has another adapter than a plain one (LoRA).
    """
    check_plain(model)
    before = base.state_dict()
    now = _weights(model, before)
    adapted = {f"{k}.weight": factors(m) for k, m in model.named_modules() if is_adapted(m)}
    if odd := sorted(k for k, v in before.items() if k not in now or now[k].shape != v.shape):
        raise ValueError(f"model: it was not made from base, whose {odd[0]} it does not have in that shape")
    other = {k for k, v in before.items() if not _equal(now[k], v)}
    if other == before.keys():
        raise ValueError(
            "model: it has no tensor of base as it was, so there is nothing that an adapter could leave out; "
            "save it whole (save_pretrained)"
        )
    tensors: dict[str, Tensor] = {}
    inherits: dict[str, str] = {}
    losses, places = {"": 0.0}, dict[tuple[int, torch.Size], str]()
    for name, value in now.items():
        first = places.setdefault((value.data_ptr(), value.shape), name)
        if first != name:
            if {first, name} & adapted.keys():
                raise ValueError(
                    f"model: {name} and {first} are one weight, which the adapter beside it would change in "
                    "both places; merge it first (merge_and_unload of peft)"
                )
            if {first, name} <= before.keys() and before[name].data_ptr() == before[first].data_ptr():
                continue  # put on the base, it is there in both places
            value = value.clone()  # of a base that has two
        pair = adapted.get(name)
        if name in before and name not in other and pair is None:
            continue
        if name in before and name not in other:
            value = before[name]  # of which the model may hold fewer digits
        exact = (_wide(value) if pair is None else changed(value, *pair)).cpu()
        origin = name
        if pair is None or name in other:  # also where its matrix moved beside its adapter
            origin, pair = _few(name, exact, before, rank)
        if pair is None:
            # Of a base in float32 no digit is lost that a merged model would have.
            kept = before[name].dtype if name in before else dtype if value.ndim > 1 else value.dtype
            stored = tensors[name] = exact.to(kept).contiguous()
        else:
            if origin != name:
                inherits[name] = origin
            up, down = tensors[name + UP], tensors[name + DOWN] = _packed(pair, dtype)
            stored = changed(before[origin].cpu(), up, down)
        losses[name] = _lost(stored, exact, before.get(origin))
    worst = max(losses, key=losses.__getitem__)
    return Difference(tensors, inherits, losses[worst], worst)


def _weights(model: Any, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a model by the names of its base, without adapters.

    One by one, and not as its state_dict: of a sharded model that has slices, though it is gathered.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    # Some buffers are no weights; those of the base that are have a place in its state_dict.
    own |= {name: value for name, value in model.named_buffers() if name in before}
    return {k.replace(".base_layer.", "."): v.detach() for k, v in own.items() if ".lora_" not in k}


def _few(
    name: str, exact: Tensor, before: dict[str, Tensor], rank: int | None
) -> tuple[str, tuple[Tensor, Tensor] | None]:
    """Return two factors of what a matrix adds to one of the base, and which; None if they save nothing."""
    if rank is None or exact.ndim != 2 or rank * sum(exact.shape) >= exact.numel():
        return name, None
    origin = name if name in before else _nearest(name, exact, before)
    if origin is None:
        return name, None
    U, s, V = torch.linalg.svd(exact - _wide(before[origin]).cpu(), full_matrices=False)
    root = s[:rank].sqrt()
    return origin, (U[:, :rank] * root, root[:, None] * V[:rank])


def _nearest(name: str, exact: Tensor, before: dict[str, Tensor]) -> str | None:
    """Return the base's matrix of that kind (`q_proj`, say) that a new one is nearest to; None: zero is."""
    kind = name.split(".")[-2:]
    far = {
        other: (exact - _wide(value).cpu()).norm().item()
        for other, value in before.items()
        if other.split(".")[-2:] == kind and value.shape == exact.shape
    }
    nearest = min(far, key=far.__getitem__, default=None)
    return nearest if nearest is not None and far[nearest] < exact.norm().item() else None


def _packed(pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    up, down = (t.cpu().to(dtype).contiguous() for t in pair)
    return up, down


def _lost(stored: Tensor, exact: Tensor, origin: Tensor | None) -> float:
    """Return which share of a tensor's distance from where it began is not in what is stored of it."""
    start = torch.zeros_like(exact) if origin is None else origin.cpu()
    learned = (exact - start).norm()
    return ((stored - exact).norm() / learned.clamp(min=1e-30)).item()


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _equal(now: Tensor, old: Tensor) -> bool:
    """Compare in the dtype of the model that was trained, to which the base may have been rounded."""
    return torch.equal(now.cpu(), old.cpu().to(now.dtype))
