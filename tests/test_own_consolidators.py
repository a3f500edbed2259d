import json
import re
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import close, lively, random_tokens, run_command, same_memory, tiny
from hf_models import HEADS, SMALL, VOCAB, family, with_memory
from processes import in_a_process_of_its_own
from sequences import heard
from test_own_rules import RULE
from transformers import GlmConfig, GlmForCausalLM, LlamaConfig, LlamaForCausalLM

from lmsleep import Passes, Session, SessionBatch, SleepConfig, adapt, sleep_forward
from lmsleep.hf import from_pretrained, sleepify
from lmsleep.opening import open_backbone
from lmsleep.training import RunFolder

OWN = """
from dataclasses import dataclass

from lmsleep import Consolidator, Eviction
from lmsleep.sleep import speak, wake
from lmsleep.state import Memory, State


@dataclass(frozen=True)
class Backwards(Consolidator):
    strength: float = 0.5

    def sleep_on(self, model, window, *, logits=True):
        loop = 0, model.num_blocks
        seen = wake(model, window, loop)
        awake, state = speak(model, window, seen, loop, logits=logits)
        for _ in range(1, self.passes):
            begin = State(state.memory, seen.before.cache)
            _, again = window.run(model, model.embed(window.tokens.flip(1)), begin, *loop)
            pairs = zip(state.memory.layers, again.memory.layers)
            mixed = (None if a is None else a.lerp(b, self.strength) for a, b in pairs)
            state = State(Memory(tuple(mixed)), state.cache)
        return awake, state


@dataclass(frozen=True)
class Oldest(Eviction):
    tokens: int = 2

    def keep(self, cache, L):
        return cache.map(lambda t: t[:, : self.tokens])


class NotOne(Consolidator):
    pass
"""
TASK = """
from dataclasses import dataclass

from lmsleep.tasks import MQAR


@dataclass(frozen=True, kw_only=True)
class Mine(MQAR):
    '''Recall, once more.'''
"""
TINY = "--steps 3 --eval-every 3 --eval-batches 1 --save-every 2 --batch-size 4 --d-model 16 --num-heads 2"
OPTIONS = [*TINY.split(), "--window", "8", "--threads", "1", "--device", "cpu"]


@pytest.fixture
def files(tmp_path):
    paths = {name: tmp_path / f"{name}.py" for name in ("own", "my_rule", "my_task")}
    for path, text in zip(paths.values(), (OWN, RULE, TASK), strict=True):
        path.write_text(text)
    yield paths
    for path in paths.values():
        sys.modules.pop(str(path), None)


@pytest.mark.timeout(600)
def test_a_rule_a_consolidator_and_a_task_of_ones_own_cross_every_process(files, tmp_path):
    run, memory, elsewhere = tmp_path / "run", tmp_path / "a.mem", tmp_path / "elsewhere"
    elsewhere.mkdir()
    by = ["--sleep", "own.py:Backwards,strength=0.25", "--passes", "3"]
    rule = ["--blocks", "attention", "my_rule.py:mine"]
    options = [*OPTIONS, "--data-workers", "1", "--out", run]
    in_a_process_of_its_own(tmp_path, "train", "my_task.py:Mine", *by, *rule, *options)
    saved = json.loads((run / "config.json").read_text())
    assert saved["task"]["name"] == f"{files['my_task']}:Mine"
    assert saved["model"]["blocks"] == ["attention", f"{files['my_rule']}:mine"]
    name = f"{files['own']}:Backwards"
    assert saved["sleep"]["consolidator"] == {"name": name, "passes": 3, "strength": 0.25}
    in_a_process_of_its_own(elsewhere, "train", "--resume", run)
    assert json.loads(in_a_process_of_its_own(elsewhere, "eval", run, "--batches", 1, "--json"))
    (tmp_path / "text.txt").write_text("k1 v1 k2 v2 k3 v3 k1 v1 k2 v2 k3 v3")
    in_a_process_of_its_own(elsewhere, "read", run, tmp_path / "text.txt", "--memory", memory)
    in_a_process_of_its_own(elsewhere, "ask", run, "--memory", memory, "k1")
    folder = RunFolder.open(run)
    with pytest.raises(
        ValueError, match=r"its consolidator is code, .*own.py:Backwards; if you trust it, give a"
    ):
        Session.load(memory, folder.model())
    sleep = Session.load(memory, folder.model(), sleep=folder.config().sleep).sleep_config
    assert sleep.consolidator.strength == 0.25 and sleep.to_dict() == saved["sleep"]


def test_a_hugging_face_folder_keeps_ones_own_consolidator_and_eviction(files, tmp_path):
    sleep = SleepConfig(window=4, consolidator=f"{files['own']}:Backwards", passes=2, strength=0.1)
    model, x = sleepify(family("qwen3_5"), sleep), random_tokens(2, 11, vocab=60)
    model.save_pretrained(tmp_path / "hub")
    again = from_pretrained(tmp_path / "hub")
    assert again.sleep == sleep == model.sleep
    assert torch.equal(again(x).logits, model(x).logits)
    plain = sleepify(model, SleepConfig(window=4, consolidator=Passes(2)))(x).logits
    assert not close(plain, again(x).logits, 1e-4)
    _, found = open_backbone(tmp_path / "hub", "cpu")
    assert found == sleep
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "lets Backwards (N = 2) write it" in card and "`strength` | `0.1`" in card


def test_ones_own_consolidator_streams_as_it_reads_and_rows_do_not_meet(files):
    model, tokens = lively(tiny("attention", "gated_delta_net")), random_tokens(3, 14)
    sleep = SleepConfig(window=4, consolidator=f"{files['own']}:Backwards", passes=2)
    lengths = torch.tensor([14, 12, 9])
    whole = sleep_forward(model, tokens, None, sleep, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        if n % 4 == 0 or n == 14:  # this one reads padding backwards, before the tokens
            alone = sleep_forward(model, tokens[row : row + 1, :n], None, sleep)
            assert same_memory(whole.memory[[row]], alone.memory)
        session = Session(model, sleep)
        for token in tokens[row, :n].tolist():
            session.read([token])
        assert session.stats.sleeps == (n - 1) // 4
        once = sleep_forward(model, tokens[row : row + 1, :n], None, sleep)
        assert same_memory(session.memory, once.memory)
    assert not same_memory(
        whole.memory, sleep_forward(model, tokens, None, sleep.with_passes(1), lengths=lengths).memory
    )


def test_ones_own_eviction_chooses_what_stays_row_by_row(files):
    model, tokens = lively(tiny("attention", "gated_delta_net")), random_tokens(2, 14)
    sleep = SleepConfig(window=4, passes=2, eviction=f"{files['own']}:Oldest")
    out = sleep_forward(model, tokens, None, sleep, evict_last=True)
    assert out.state.cache.layers[0][0].shape[1] == 2
    ended = sleep_forward(model, tokens, None, sleep, lengths=torch.tensor([14, 3]))
    alone = sleep_forward(model, tokens[[1], :3], None, sleep)
    assert ended.state.cache.counts(2).tolist() == [4, 3]
    assert close(ended.state.split()[1].cache.layers[0][0], alone.state.cache.layers[0][0])
    session = Session(model, sleep)
    session.read(tokens[0].tolist())
    first = sleep_forward(model, tokens[[0]], None, sleep)
    assert close(session.working.layers[0][0], first.state.cache.layers[0][0])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "own.py:Nosuch",
            "own.py has no class 'Nosuch'; call the consolidator own.py:CLASS, one of: Backwards",
        ),
        ("own.py:NotOne", "is no consolidator: it must be a dataclass"),
        ("nobody", "unknown consolidator 'nobody'; choose one of passes, gradient-steps, "),
    ],
)
def test_what_is_no_consolidator_is_said_in_one_line(files, name, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_command(capsys, "train", "mqar", "--sleep", name)
    assert code == 2 and said in " ".join(err.split()) and not out


def test_a_sleep_says_which_options_it_has():
    with pytest.raises(
        ValueError, match=r"^strength: no option of a sleep with Passes; it has window, .*loop"
    ):
        SleepConfig(strength=1)
    with pytest.raises(ValueError, match=r"^checkpoint: an option of the training"):
        SleepConfig(window=4, checkpoint=True)
    with pytest.raises(ValueError, match="backprop_passes must be at least 1, got 0"):
        sleep_forward(
            lively(tiny("gated_delta_net")), random_tokens(1, 3), None, SleepConfig(), backprop_passes=0
        )


def from_the_docs(name, folder):
    # Writes the example of the class into a file, and returns what configurations call it.
    page = (Path(__file__).parents[1] / "docs" / "carry-on.md").read_text()
    (example,) = (text for text in re.findall(r"```python\n(.*?)```", page, re.S) if f"class {name}" in text)
    (folder / "example.py").write_text(textwrap.dedent(example))
    return f"{folder / 'example.py'}:{name}"


def test_the_example_of_the_docs_strengthens_what_a_window_wrote(tmp_path):
    model, tokens = lively(tiny("attention", "gated_delta_net")), random_tokens(2, 4)
    nap = SleepConfig(window=4, consolidator=from_the_docs("Nap", tmp_path), passes=3, share=0.5)
    once = sleep_forward(model, tokens, None, SleepConfig(window=4)).memory.layers[1]
    assert close(sleep_forward(model, tokens, None, nap, evict_last=True).memory.layers[1], 2 * once)


@pytest.fixture
def sinks(tmp_path):
    sleep = SleepConfig(window=6, passes=2, eviction=from_the_docs("Sinks", tmp_path))
    return replace(sleep, eviction=replace(sleep.eviction, first=2, newest=3))


@pytest.mark.parametrize("kind", ["hybrid", "llama", "glm"])
def test_what_stays_by_the_example_of_the_docs_stands_as_if_nothing_had_been_between(kind, sinks):
    # The keys of a single block of attention depend on their tokens alone.
    one = {**SMALL, **HEADS, "num_hidden_layers": 1, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    model = {
        "hybrid": lambda: lively(tiny("attention", vocab_size=VOCAB), dtype=torch.float32),
        "llama": lambda: adapt(LlamaForCausalLM(LlamaConfig(**one)).eval(), attention_alone=True),
        "glm": lambda: adapt(GlmForCausalLM(GlmConfig(**one, head_dim=8)).eval(), attention_alone=True),
    }[kind]()
    tokens = 1 + random_tokens(23, vocab=VOCAB - 1)
    session, end = Session(model, replace(sinks, passes=1)), slice(18, 23)
    session.read(tokens[: end.start])
    session.sleep()
    in_view = torch.cat([tokens[:2], tokens[end.start - 3 : end.stop]])
    said = Session(model, SleepConfig()).logits(in_view)[5:]
    assert close(session.logits(tokens[end]), said, 1e-5)
    assert session.working.layers[0][0].shape[1] == 5


@pytest.mark.parametrize("kind", ["hybrid", "llama"])
def test_a_session_by_the_example_of_the_docs_goes_on_from_its_file(kind, sinks, tmp_path):
    model, tokens = lively(tiny("attention", "gated_delta_net")), 1 + random_tokens(23, vocab=10)[None]
    if kind == "llama":  # with layers that recall what S was when the window began
        model = adapt(with_memory(family("llama"), 2, "gated_delta_net"))
    near = 1e-9 if kind == "hybrid" else 1e-4
    whole = sleep_forward(model, tokens, None, sinks)
    for pieces in ([1] * 23, [5, 11, 7]):
        session = Session(model, sinks)
        for piece in tokens[0].split(pieces):
            session.read(piece)
        assert same_memory(session.memory, whole.memory, near)
    session.save(tmp_path / "a.mem")
    with pytest.raises(ValueError, match=r"its eviction is code, .*example.py:Sinks; if you trust it, give"):
        Session.load(tmp_path / "a.mem", model)
    again = Session.load(tmp_path / "a.mem", model, sleep=sinks)
    assert torch.equal(again.logits(tokens[0, :9]), session.logits(tokens[0, :9]))
    texts = tokens[0, :8], tokens[0, :9]  # the first begins, the other stands within a window
    batch = SessionBatch([Session(model, sinks), session.fork()])
    batch.read(texts)
    for one, before, text in zip(batch.sessions, (tokens[0, :0], tokens[0]), texts, strict=True):
        alone = sleep_forward(model, torch.cat([before, text])[None], None, sinks)
        assert same_memory(one.memory, alone.memory, near)
        assert close(heard(one), alone.logits[0, -1], near)


def test_what_is_recalled_is_what_was_known_when_a_window_began_whatever_stays(sinks):
    model, x = adapt(with_memory(family("llama"), 2, "gated_delta_net")), 1 + random_tokens(2, 20, vocab=10)
    with torch.no_grad():
        begun = sleep_forward(model, x[:, :18], None, sinks, evict_last=True).memory
        held = sleep_forward(model, x, None, sinks).state.cache.layers
    for i, layout in enumerate(model.layouts):
        assert layout.recalls == (begun.layers[i] is not None)
        assert not layout.recalls or close(held[i][-1][:, 0], begun.layers[i].flatten(1), 1e-6)


def test_an_eviction_in_a_file_is_named_to_commands(sinks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["train", "mqar", "--eviction", "example.py:Sinks", *OPTIONS, "--out", "run"]
    assert run_command(capsys, *argv)[0] == 0
    saved = json.loads(Path("run/config.json").read_text())["sleep"]["eviction"]
    assert saved == {"name": f"{tmp_path / 'example.py'}:Sinks", "first": 4, "newest": 32}
    Path("text.txt").write_text("k1 v1 k2 v2 k3 v3 k1 v1 k2 v2 k3 v3")
    for command in ("read run text.txt --memory a.mem", "ask run --memory a.mem k1"):
        code, out, err = run_command(capsys, *command.split())
        assert code == 0, err
    for wrong in ("example.py:Nosuch", "nobody"):
        code, out, err = run_command(capsys, "train", "mqar", "--eviction", wrong)
        assert code == 2 and err.count("\n") == 1 and wrong.split(":")[-1] in err and not out
