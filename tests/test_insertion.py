import json

import pytest
import torch
import torch.nn.functional as F
from conftest import close
from hf_models import ATTENTION_ONLY, family, held, with_memory

from lmsleep import Session, SleepConfig, adapt, sleep_forward
from lmsleep.hf import insert_memory_layers, load_pretrained
from lmsleep.hf.cache_name import named
from lmsleep.hf.ouro import OuroConfig, OuroForCausalLM

KINDS = pytest.mark.parametrize("kind", ["jet", "gated_delta_net", "kda"])
RECALLS = pytest.mark.parametrize("kind", ["gated_delta_net", "kda"])
EACH = pytest.mark.parametrize("name", ATTENTION_ONLY)
TOKENS = torch.arange(1, 12)[None]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}


def alive(name, kind="jet", n=2):
    return with_memory(family(name), n, kind)


@EACH
@KINDS
def test_insertion_changes_nothing(name, kind):
    model = family(name)
    logits, answer = model(TOKENS).logits, model.generate(TOKENS, **GREEDY)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    inserted = insert_memory_layers(model, 2, kind)
    assert inserted.after == (1, 3) and inserted.kind == kind
    assert torch.equal(model(TOKENS).logits, logits)
    assert torch.equal(model.generate(TOKENS, **GREEDY), answer)
    added = {k: v for k, v in model.state_dict().items() if k not in weights}
    assert all(".memory." in k for k in added)
    assert sum(v.numel() for v in added.values()) == inserted.parameters
    assert inserted.share == inserted.parameters / sum(v.numel() for v in weights.values())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items() if k in weights)


@pytest.mark.parametrize(
    ("kind", "share", "after"),
    [("jet", 0.0813, (3, 7, 11, 15, 19, 23)), ("gated_delta_net", 0.0705, (2, 6, 10, 14, 18, 22))],
)
def test_six_layers_add_less_than_a_tenth_to_ouro(kind, share, after):
    with torch.device("meta"):
        model = OuroForCausalLM(OuroConfig.preset("1.4B"))
        inserted = insert_memory_layers(model, 6, kind)
    assert inserted.after == after
    assert abs(inserted.share - share) < 1e-4 and inserted.share < 0.1


@KINDS
def test_a_fresh_insertion_sleeps_and_learns(kind):
    # Its output is zero, so adapt must look at what it writes, and only what makes it zero has a gradient.
    model = family("llama")
    plain = model(TOKENS).logits
    insert_memory_layers(model, 2, kind)
    backbone = adapt(model)
    assert backbone.kinds == ("attention", "attention+fast_weights") * 2
    out = sleep_forward(backbone, TOKENS, None, SleepConfig(window=11, passes=3))
    assert torch.equal(out.logits, plain)
    model.requires_grad_(False)
    for block in (1, 3):
        model.model.layers[block].memory.requires_grad_(True)
    mask = torch.ones_like(TOKENS, dtype=torch.bool)
    config = SleepConfig(window=4, passes=2)
    sleep_forward(backbone.train(), TOKENS, mask, config, checkpoint=True).loss.backward()
    touched = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    silent = "o_proj.weight" if kind == "jet" else "gate"
    assert touched == [f"model.layers.{i}.memory.mixer.{silent}" for i in (1, 3)]


def test_an_insertion_that_forgets_its_state_is_refused(monkeypatch):
    model = family("llama")
    insert_memory_layers(model, 2)
    mixer = model.model.layers[1].memory
    monkeypatch.setattr(mixer, "forward", lambda h, S, *rest, run=mixer.forward: run(h, None, *rest))
    with pytest.raises(ValueError, match="block 1 ignores the fast weights"):
        adapt(model)


@EACH
@KINDS
def test_a_saved_model_has_its_memory_layers(name, kind, tmp_path):
    model = alive(name, kind)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["memory_layers"] == {"kind": kind, "after": [1, 3]}
    again = load_pretrained(tmp_path)
    assert type(again) is type(model) and torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_a_loaded_model_answers_like_the_saved_one(tmp_path):
    model, sleep = alive("llama"), SleepConfig(window=4, passes=3)
    model.save_pretrained(tmp_path)
    answers = [Session(adapt(m), sleep).generate([1, 2, 3], 9) for m in (model, load_pretrained(tmp_path))]
    assert answers[0] == answers[1]


@EACH
def test_the_cache_of_transformers_carries_it(name):
    model, cache, parts = alive(name, "jet"), None, []
    with torch.no_grad():
        whole = model(TOKENS).logits
        for piece in TOKENS.split([1, 1, 1, 4, 1, 3], dim=1):
            out = model(piece, **named(cache), use_cache=True)
            cache = held(out)
            parts.append(out.logits)
        assert close(torch.cat(parts, dim=1), whole, 1e-4)
        silent = family(name)(TOKENS).logits
    assert not close(whole, silent, 1e-3)


@EACH
@RECALLS
def test_awake_with_all_in_attention_nothing_is_recalled(name, kind):
    model = alive(name, kind)
    assert torch.equal(model(TOKENS).logits, family(name)(TOKENS).logits)
    assert torch.equal(model.generate(TOKENS, **GREEDY), family(name).generate(TOKENS, **GREEDY))


@KINDS
def test_ouros_later_steps_do_not_see_later_tokens(kind):
    model = alive("ouro", kind)
    with torch.no_grad():
        assert close(model(TOKENS[:, :6]).logits, model(TOKENS).logits[:, :6], 1e-5)


@EACH
@KINDS
def test_padding_in_front_of_a_row_changes_nothing(name, kind):
    model = alive(name, kind)
    model.set_attn_implementation("eager" if kind == "jet" else "sdpa")  # masks of either form
    padded, mask = F.pad(TOKENS, (3, 0)), F.pad(torch.ones_like(TOKENS), (3, 0))
    with torch.no_grad():
        out = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        assert close(out.logits[:, 3:], model(TOKENS).logits, 1e-4)
        answer = model.generate(padded, attention_mask=mask, **GREEDY)[:, 14:]
        assert torch.equal(answer, model.generate(TOKENS, **GREEDY)[:, 11:])


def test_what_cannot_be_inserted_says_why():
    with pytest.raises(ValueError, match=r"n=9 must lie in 1 \.\.\. 4"):
        insert_memory_layers(family("llama"), 9)
    with pytest.raises(ValueError, match="kind='lstm' is unknown; choose one of gated_delta_net, kda, jet"):
        insert_memory_layers(family("llama"), 2, "lstm")
    with pytest.raises(ValueError, match=r"after=\[1, 4\] must name different blocks of 0 \.\.\. 3"):
        insert_memory_layers(family("llama"), where=[1, 4])
    with pytest.raises(ValueError, match="qwen3_5_text has more than attention"):
        insert_memory_layers(family("qwen3_5"), 2)
    with pytest.raises(ValueError, match="llama has more than attention"):
        insert_memory_layers(alive("llama"), 2)
    with pytest.raises(ValueError, match="no decoder with a list of blocks"):
        insert_memory_layers(torch.nn.Linear(1, 1))
    assert insert_memory_layers(family("llama"), where=[2, 0]).after == (0, 2)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"kind": "jet", "after": [1, 7]}, r"memory_layers: after=\[1, 7\]"),
        ({"after": [1, 3]}, "kind=None is unknown"),
        ({"kind": "jet", "after": [[1]]}, r"memory_layers: after=\[\[1\]\]"),
        ("six", "memory_layers='six' must be an object with kind and after"),
        ({"kind": "jet", "after": [2, 3]}, r"lack model\.layers\.2\.memory"),
        (None, r"hold model\.layers\.1\.memory"),
    ],
)
def test_a_damaged_description_is_refused(described, message, tmp_path):
    alive("llama").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "memory_layers": described}))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


@EACH
def test_one_pass_over_a_window_that_holds_all_is_bit_equal_to_the_model(name):
    model = alive(name)
    model.config.total_ut_steps = 1  # of Ouro
    with torch.no_grad():
        out = sleep_forward(adapt(model), TOKENS, None, SleepConfig(window=11, passes=1))
        assert torch.equal(out.logits, model(TOKENS, use_cache=False).logits)


@KINDS
def test_low_precision_has_exact_memory(kind):
    model = alive("llama", kind).bfloat16()
    with torch.no_grad():
        out = sleep_forward(adapt(model), TOKENS, None, SleepConfig(window=4, passes=2))
    assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all()
    assert {S.dtype for S in out.memory.layers if S is not None} == {torch.float32}
