import logging
import os
import tempfile

import torch
from hypothesis import settings
from torch import Tensor

from lmsleep import HybridConfig, HybridLM
from lmsleep.cli import main

# As many processes as cores test already: one thread for each, and for whatever they start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What tests train with may run here; nothing of it is remembered for the user who runs them.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp()
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("suite")

VOCAB = 11


class Deprecations(logging.Handler):
    # What a library logs of a use that will end is an error, as its warnings are (filterwarnings).
    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage():
            raise DeprecationWarning(record.getMessage())


for library in (None, "transformers", "datasets", "huggingface_hub"):  # None: the root; these do not tell it
    logging.getLogger(library).addHandler(Deprecations())


def tiny(*blocks, **options) -> HybridConfig:
    defaults = {"vocab_size": VOCAB, "d_model": 16, "num_heads": 2, "mlp_dim": 24}
    return HybridConfig(blocks=blocks or ("attention", "gated_delta_net"), **{**defaults, **options})


def lively(config: HybridConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> HybridLM:
    # Every parameter is moved off its initial value: gates that start at zero hide errors.
    torch.manual_seed(seed)
    model = HybridLM(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.7 * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    return model


def random_tokens(*shape: int, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    # RMS of the difference over the RMS of what is expected (or over the floor, if that is larger).
    assert actual.shape == expected.shape
    difference = (actual.double() - expected.double()).norm().item()
    return difference / max(expected.double().norm().item(), floor, 1e-300)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    # Largest difference against the largest expected value.
    assert actual.shape == expected.shape
    if expected.numel() == 0:
        return True
    worst = (actual - expected).abs().max().item()
    return worst <= tolerance * max(expected.abs().max().item(), 1e-300)


def same_memory(actual, expected, tolerance: float = 1e-12) -> bool:
    return all(
        (s is None and r is None) or close(s, r, tolerance)
        for s, r in zip(actual.layers, expected.layers, strict=True)
    )


def run_command(capsys, *argv) -> tuple[int, str, str]:
    # Exit code, stdout and stderr of a command; what fixtures printed before is left out.
    capsys.readouterr()
    try:
        main([str(a) for a in argv])
        code = 0
    except SystemExit as leaving:
        code = leaving.code
    out = capsys.readouterr()
    return code, out.out, out.err
