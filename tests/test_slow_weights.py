"""Slow weights: what a session holds and a text, distilled into an adapter of peft."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from benchmarks import __main__ as benchmarks
from benchmarks.slow_weights.memory import answered
from conftest import close, lively, run_command, tiny
from hf_models import VOCAB, family, with_memory
from safetensors.torch import load_file
from test_hf_loading import tokenizer

from lmsleep import Compact, Session, SleepConfig, adapt, fingerprint
from lmsleep.evaluation.slow_weights import nats
from lmsleep.hf import load_pretrained, sleepify
from lmsleep.progress import progress
from lmsleep.session import Distillation, SlowWeights
from lmsleep.session.distillation import Lesson, Teacher
from lmsleep.tasks import Batch
from lmsleep.text.tokenizers import load_tokenizer

# peft asks transformers for it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
SLEEP = SleepConfig(window=6, passes=2)
TEXT = torch.arange(20, 30)
FEW = Distillation(rank=2, steps=2, samples=1, length=3)


@pytest.fixture(scope="module")
def plain():
    return family("llama").double()


@pytest.fixture(scope="module")
def model(plain):
    """The backbone of that llama with memory layers that speak."""
    torch.manual_seed(0)
    return adapt(with_memory(copy.deepcopy(plain), 2, "gated_delta_net"))


@pytest.fixture
def session(model):
    """A session that has slept on twelve tokens, and holds two more."""
    read = Session(model, SLEEP)
    read.read(list(range(1, 15)))
    return read


@pytest.fixture(scope="module")
def made(model):
    read = Session(model, SLEEP)
    read.read(list(range(1, 15)))
    return read.consolidate(TEXT, Distillation(rank=2, steps=20, samples=2, length=4, lr=1e-2))


def lessons(teacher, windows, how=FEW):
    with progress(show=False) as bar:
        return list(teacher.lessons(windows, how, bar))


def divergence_by_hand(student, teacher):
    """KL in nats, position by position and token by token; logits as numpy arrays."""
    total = 0.0
    for q, p in zip(student, teacher, strict=True):
        p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (p, q))
        total += sum(float(p[v]) * math.log(p[v] / q[v]) for v in range(len(p)))
    return total


@torch.no_grad()
def test_the_loss_is_the_divergence_of_two_readings_by_transformers(model, plain):
    # Nothing was slept on, so memory layers are silent: teacher and student are the plain model, which has
    # the text before it, or nothing.
    begin = Session(model, SLEEP)
    teacher = Teacher(model, SLEEP, begin.stream, TEXT[:0], ())
    own, sampled = lessons(teacher, [TEXT])
    written = sampled.tokens
    assert torch.equal(own.tokens, TEXT) and not own.sampled and sampled.sampled and len(written) == 3
    for lesson in (own, sampled):
        whole = torch.cat([TEXT, lesson.tokens])[None]
        knows = plain(whole).logits[0, len(TEXT) :].numpy()
        does_not = plain(lesson.tokens[None]).logits[0].numpy()
        expected = divergence_by_hand(does_not, knows)
        assert expected > 0.01
        assert lesson.loss(model, model).item() == pytest.approx(expected, rel=1e-9)


@torch.no_grad()
def test_the_teacher_has_the_memory_and_the_open_window(session, model):
    teacher = Teacher(model, SLEEP, session.stream, TEXT[:0], ())
    [own, _] = lessons(teacher, [TEXT])
    # The same as a session that goes on reading, and never evicts.
    reader = Session(model, replace(SLEEP, window=None))
    reader.stream = session.stream
    expected = reader.logits(torch.cat([TEXT, TEXT]))[len(TEXT) :]
    assert close(model.head(own.h)[0], expected)
    assert not close(expected, Session(model, replace(SLEEP, window=None)).logits(TEXT), 1e-3)
    # Without a text all is written by the teacher, after the prompt.
    [alone] = lessons(Teacher(model, SLEEP, session.stream, torch.tensor([5, 6]), ()), [])
    assert alone.sampled and alone.tokens[:2].tolist() == [5, 6] and len(alone.tokens) == 5
    assert close(model.head(alone.h)[0], reader.logits(alone.tokens))


def test_what_is_written_is_what_a_session_writes(session, model):
    reader = Session(model, replace(SLEEP, window=None))
    reader.stream = session.stream
    how = Distillation(samples=4, length=5, seed=3)
    found = lessons(Teacher(model, SLEEP, session.stream, TEXT[:0], ()), [], how)
    expected = [reader.fork().generate((), 5, temperature=1.0, seed=3 + i) for i in range(4)]
    assert [x.tokens.tolist() for x in found] == expected and len({*map(tuple, expected)}) > 1
    # And after a window of text, each with draws of its own.
    [_, *after, _, last] = lessons(Teacher(model, SLEEP, session.stream, TEXT[:0], ()), TEXT.split(5)[:1] * 2,
                                   replace(how, samples=1))  # fmt: skip
    reader.read(TEXT[:5])
    written = [reader.fork().generate((), 5, temperature=1.0, seed=3 + i) for i in range(2)]
    assert [x.tokens.tolist() for x in (*after, last)] == written
    ended = Teacher(model, SLEEP, session.stream, TEXT[:0], range(VOCAB))
    assert lessons(ended, [], how) == []


def test_with_nothing_in_view_there_is_nothing_to_learn(model):
    student = model.adapted(rank=2, alpha=4.0)
    begin = model.initial_state(1)
    h, _ = model.run(model.embed(TEXT[None]), begin, 0, model.num_blocks)
    loss = Lesson(TEXT, h.detach(), sampled=False).loss(model, student)
    loss.backward()
    gradients = [p.grad for p in student.parameters() if p.requires_grad]
    assert abs(loss.item()) < 1e-12 and all(g.abs().max() < 1e-12 for g in gradients)
    # And with something in view there is.
    _, seen = model.run(model.embed(torch.arange(40, 45)[None]), begin, 0, model.num_blocks)
    h, _ = model.run(model.embed(TEXT[None]), seen, 0, model.num_blocks)
    Lesson(TEXT, h.detach(), sampled=False).loss(model, student).backward()
    assert any(p.grad.abs().max() > 1e-6 for p in student.parameters() if p.requires_grad)


def test_the_student_knows_without_memory_what_the_teacher_said(session):
    known = session.fork().generate([3], 12)
    text = [torch.tensor([3, *known])]
    how = Distillation(rank=8, steps=30, lr=1e-2, samples=16, length=12)
    made = session.consolidate(None, how, prompt=[3])
    assert made.text_tokens == 0 and made.sampled_tokens == 16 * 13
    assert sum(made.divergence[-5:]) < 0.5 * sum(made.divergence[:5])
    before, after = nats(session.model, text), nats(made.model, text)
    taught = nats(session.model, text, session.stream.state)
    assert taught < after < before - 0.2 * (before - taught)


def test_the_session_and_its_model_stay_as_they_are(session, model):
    before = [t.clone() for t in session.stream.state.tensors()]
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    identity, flags = fingerprint(model), [p.requires_grad for p in model.parameters()]
    torch.manual_seed(7)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    made = session.consolidate(TEXT, FEW)
    assert torch.equal(torch.rand(3), drawn)
    assert all(map(torch.equal, before, session.stream.state.tensors()))
    assert session.stats.tokens == 14 and not hasattr(model.blocks[0].self_attn.q_proj, "lora_A")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    assert fingerprint(model) == identity and [p.requires_grad for p in model.parameters()] == flags
    # The adapted model lies in the same memory; only the adapter was added, and trained.
    shared = {t.data_ptr() for t in model.parameters()}
    added = [p for p in made.model.parameters() if p.data_ptr() not in shared]
    assert added and all(p.requires_grad for p in added)
    assert made.nbytes == sum(p.nbytes for p in added)
    assert not any("memory" in name for name, p in made.model.named_parameters() if p.requires_grad)


def test_the_same_seed_gives_the_same_adapter(session):
    def weights(seed):
        found = session.consolidate(TEXT, replace(FEW, seed=seed)).model
        return [p for p in found.parameters() if p.requires_grad]

    first = weights(0)
    assert all(map(torch.equal, first, weights(0))) and not all(map(torch.equal, first, weights(1)))


@torch.no_grad()
def test_plain_peft_loads_merges_and_removes_it(made, model, plain, tmp_path):
    made.save(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tokens = torch.arange(3, 15)[None]
    # On the model with memory layers, and on the one without.
    for base in (model.model, plain):
        before = base(tokens).logits
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
        with_it = wrapped(tokens).logits
        assert torch.equal(with_it, made.model.model(tokens).logits) and not close(with_it, before, 1e-3)
        assert torch.equal(wrapped.unload()(tokens).logits, before)
        merged = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").merge_and_unload()
        assert close(merged(tokens).logits, with_it, 1e-12)
    # A session reads with what peft loaded.
    loaded = adapt(peft.PeftModel.from_pretrained(copy.deepcopy(model.model), tmp_path / "adapter"))
    assert torch.equal(Session(loaded, SLEEP).logits(TEXT), Session(made.model, SLEEP).logits(TEXT))
    with pytest.raises(ValueError, match=r"^model: it has an adapter already; merge it"):
        Session(loaded, SLEEP).consolidate(TEXT, FEW)


def test_a_model_that_sleepify_made_has_slow_weights_too(model, made):
    sleeping = adapt(sleepify(copy.deepcopy(model.model), SLEEP))
    read = Session(sleeping, SLEEP)
    read.read(list(range(1, 15)))
    again = read.consolidate(TEXT, made.how)
    assert again.divergence == pytest.approx(made.divergence, rel=1e-9)
    assert not hasattr(sleeping.blocks[0].self_attn.q_proj, "lora_A")


def test_in_low_precision_the_adapter_keeps_its_digits(tmp_path):
    # A family beside whose output projections peft puts nothing.
    low = adapt(family("nemotron_h").bfloat16())
    made = Session(low, SLEEP).consolidate(TEXT, replace(FEW, steps=3))
    trained = {name: p for name, p in made.model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert not any("out_proj" in name for name in trained) and any("in_proj" in name for name in trained)
    made.save(tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(low.model), tmp_path / "adapter")
    assert torch.equal(wrapped(TEXT[None]).logits, made.model.model(TEXT[None]).logits)


def test_a_save_is_whole_or_nothing(made, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match=r"there' exists; name another"):
        made.save(tmp_path / "there")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lmsleep.hf.adapted.write_atomic", full)
    with pytest.raises(OSError, match="No space left"):
        made.save(tmp_path / "adapter")
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"samples": -1}, "samples must be at least 0, got -1"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"alpha": 0.0}, "alpha must be positive, got 0.0"),
        ({"lr": math.inf}, "lr must be positive, got inf"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Distillation(**options)


def test_keys_that_compaction_kept_are_something_to_distil(plain):
    # All that an attention-only model holds after a sleep: no window is open, and there is no S.
    read = Session(adapt(plain, attention_alone=True), SleepConfig(window=6, eviction=Compact(keys=3)))
    read.read(list(range(1, 7)))
    read.sleep()
    assert not read.working.length
    made = read.consolidate(None, FEW, prompt=[5])
    assert made.sampled_tokens == 4  # with the prompt


def test_what_cannot_be_distilled_says_why(session, model, monkeypatch):
    with pytest.raises(ValueError, match=r"nothing to distil: no text is given, and the session has read"):
        Session(model, SLEEP).consolidate()
    with pytest.raises(ValueError, match=r"no text, and nothing sampled; take samples > 0"):
        session.consolidate(None, replace(FEW, samples=0))
    slept = session.fork()
    slept.sleep()
    with pytest.raises(ValueError, match=r"^prompt must have at least one token: nothing is in view"):
        slept.consolidate(None, FEW)
    with pytest.raises(ValueError, match=r"^text must have at least one token$"):
        session.consolidate([])
    with pytest.raises(ValueError, match="text must be tokens: this session has no tokenizer"):
        session.consolidate("text")
    with pytest.raises(ValueError, match=r"^targets: no linear map is called nose; there are down_proj"):
        session.consolidate(TEXT, replace(FEW, targets=("nose",)))
    with pytest.raises(ValueError, match=r"^the divergence is nan: lr=1e\+300 is too large"):
        session.consolidate(TEXT, replace(FEW, lr=1e300, steps=3))
    with pytest.raises(ValueError, match=r"^HybridLM takes no adapter of peft"):
        Session(lively(tiny()), SLEEP).consolidate([1, 2, 3], FEW)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match=r"needs peft: pip install 'lmsleep\[hf\]'"):
        session.consolidate(TEXT, FEW)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    where = tmp_path_factory.mktemp("models")
    copy.deepcopy(model.model).float().save_pretrained(where / "model")
    tokenizer(where / "model", VOCAB)
    (where / "text.txt").write_text("w20 w21 w22 w23 w24 w25 w26 w27")
    (where / "plain.txt").write_text("w40 w41 w42")
    return where


OPTIONS = ("--rank", 2, "--steps", 2, "--samples", 1, "--length", 3)


def test_a_memory_is_consolidated_and_merged_on_the_command_line(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    code, _, err = run_command(
        capsys, "read", "model", "text.txt", "--memory", "m.mem", "--window", 6, "--passes", 2
    )
    assert code == 0, err
    before = Path("m.mem").read_bytes()
    argv = ["memory", "consolidate", "model", "--memory", "m.mem", *OPTIONS]
    code, out, err = run_command(capsys, *argv, "--text", "text.txt", "--plain", "plain.txt", "--out", "a")
    assert code == 0 and "bits a token, known by" in out and "text in view" in out, err
    code, out, err = run_command(
        capsys, *argv, "--text", "text.txt", "--plain", "plain.txt", "--out", "b", "--json"
    )
    said = json.loads(out)
    assert said["text_tokens"] == 8 and said["sampled_tokens"] == 6 and len(said["divergence"]) == 2
    assert [*said["bits"]] == ["nothing", "memory", "text in view", "adapter"]
    assert (
        Path("a/adapter_model.safetensors").read_bytes() == Path("b/adapter_model.safetensors").read_bytes()
    )
    assert Path("m.mem").read_bytes() == before
    # What is said is what the folder holds.
    backbone, words = adapt(load_pretrained("model")), load_tokenizer("model")
    windows = torch.tensor(words.encode(Path("text.txt").read_text())).split(6)
    assert said["bits"]["nothing"]["text"] == pytest.approx(nats(backbone, windows) / math.log(2))
    saved = adapt(peft.PeftModel.from_pretrained(load_pretrained("model"), "b"))
    assert said["bits"]["adapter"]["text"] == pytest.approx(nats(saved, windows) / math.log(2))
    state = Session.load("m.mem", backbone).stream.state
    assert said["bits"]["memory"]["text"] == pytest.approx(nats(backbone, windows, state) / math.log(2))
    # The third layer of memory is shown beside the other two.
    code, out, _ = run_command(capsys, "memory", "show", "m.mem", "b")
    size = sum(t.nbytes for t in load_file("b/adapter_model.safetensors").values())
    assert code == 0 and "method       passes, eviction hard" in out
    assert f"b\n  slow weights {size:,} bytes, an adapter of rank 2\n  beside       " in out
    code, out, _ = run_command(capsys, "memory", "show", "b", "--json")
    (shown,) = json.loads(out)
    assert (shown["rank"], shown["bytes"]) == (2, size) and "q_proj" in shown["targets"]
    # A memory alone, with what the tokenizer can begin with.
    code, out, err = run_command(capsys, *argv, "--prompt", "w3", "--out", "c")
    assert code == 0 and "0 tokens of text and 4 that were sampled" in out and "known by" not in out, err
    code, out, err = run_command(capsys, "convert", "model", "merged", "--adapter", "b")
    assert code == 0, err
    merged = adapt(load_pretrained("merged"))
    assert nats(merged, windows) == pytest.approx(nats(saved, windows), rel=1e-5)
    # Its memory is another model's.
    code, _, err = run_command(capsys, "ask", "merged", "w3", "--memory", "m.mem")
    assert code == 2 and "another model" in err
    code, _, err = run_command(capsys, "info", "b")
    assert code == 2 and "lmsleep convert MODEL OUT --adapter FOLDER" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model", "--out", "x"], "name a memory file by --memory, a text by --text, or both"),
        (["model", "--text", "text.txt", "--out", "model"], "--out model exists; name a folder"),
        (["model", "--text", "text.txt", "--out", "no/x"], "there is no folder no"),
        (["model", "--text", "none.txt", "--out", "x"], "none.txt"),
        (["model", "--text", "empty.txt", "--out", "x"], "empty.txt has no text of at least two tokens"),
        (["model", "--text", "text.txt", "--out", "x", "--steps", "0"], "steps must be at least 1, got 0"),
        (["model", "--memory", "text.txt", "--out", "x"], "text.txt"),
        (["depo-N4", "--text", "words.txt", "--out", "x"], "HybridLM takes no adapter of peft"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(words, message, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    Path("empty.txt").write_text("")
    Path("words.txt").write_text("n1 n2 n3")
    code, out, err = run_command(capsys, "memory", "consolidate", *words)
    assert code == 2 and not out and err.count("\n") == 1 and message in err
    assert not Path("x").exists()


def test_an_adapter_that_does_not_fit_is_refused(folder, made, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    made.save(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**config, "target_modules": ["nose"]}))
    code, _, err = run_command(capsys, "convert", "model", "x", "--adapter", tmp_path / "adapter")
    assert code == 2 and err.splitlines()[-1].startswith(f"lmsleep: {tmp_path}/adapter: peft cannot put this")
    code, _, err = run_command(capsys, "convert", "model", "x", "--adapter", "text.txt")
    assert code == 2 and "--adapter text.txt is no folder of peft" in err and not Path("x").exists()


def test_the_card_says_what_it_is_and_was_made_of(made, tmp_path):
    assert isinstance(made, SlowWeights)
    made.save(tmp_path / "adapter")
    card = (tmp_path / "adapter/README.md").read_text()
    assert "library_name: peft" in card and "| distilled on | 10 tokens of text, 16 that" in card


def test_the_benchmark_says_who_knows_what_at_what_cost(capsys):
    benchmarks.main(["slow_weights", "--tiny", "--repeats", "1", "--json"])
    tables = json.loads(capsys.readouterr().out)
    nothing, memory, attention, *adapters = (list(row.values()) for row in tables["facts"]["rows"])
    # Memory layers that were not trained say nothing; adapters alone cost anything.
    assert nothing[1:] == memory[1:] and nothing[1:] != attention[1:] and len(adapters) == 2
    assert nothing[-3:] == [None] * 3 and all(row[-3] and row[-1] for row in adapters)
    nothing, memory, attention, *adapters = (list(row.values()) for row in tables["memory"]["rows"])
    bits = [row[2] for row in (nothing, memory, attention, *adapters)]
    assert len({*bits}) == 6  # here S speaks, to whom it is asked by and to whom it teaches
    assert all(row[-3:] == [None] * 3 for row in (nothing, memory, attention)) and all(
        r[-1] for r in adapters
    )
    spoken, text, both = (row[4] for row in adapters)
    assert 0 < spoken <= 16 * 5 < text < 200 + 8 * 5 and both > 100  # bytes of the text are among these two


@torch.no_grad()
def test_an_answer_is_right_when_each_of_its_tokens_is_the_likeliest(model):
    tokens = torch.tensor([3, 1, 4, 1, 5])
    read = Session(model, SLEEP)
    read.read(list(range(1, 13)))
    read.sleep()
    state = read.stream.state  # S is heard
    h, _ = model.run(model.embed(tokens[None]), state, 0, model.num_blocks)
    said = model.head(h)[0]
    likeliest, place = said.argmax(-1), torch.arange(5)[None] == 4

    def score(state, last):
        row = torch.cat([tokens[:4], last])[None]
        found = answered(model, state, Batch(row, place, torch.where(place, 0, -1), torch.zeros(1).long()))
        return found.accuracy == 1, found.answer_nll[0] / math.log(2)

    right, bits = score(state, likeliest[3:4])
    assert right and bits == pytest.approx(-float(said[3].log_softmax(-1).max()) / math.log(2))
    wrong = (likeliest[3:4] + 1) % model.vocab_size
    assert not score(state, wrong)[0]
    assert score(model.initial_state(1), wrong)[1] != pytest.approx(score(state, wrong)[1])
