import json
import sys
from types import SimpleNamespace

import pytest
from hf_models import tiny_llama_of_bytes
from tools import ruler

TASKS = ("ruler_fwe",)
SHORT = ("--gen-kwargs", "max_gen_toks=2")  # a tiny model writes on to the end
LENGTH = 1024  # bytes, of which the templates take a part


@pytest.fixture
def folder(tmp_path):
    """A tiny model of bytes, with silent memory layers."""
    return tiny_llama_of_bytes(tmp_path / "tiny", layers=2)


@pytest.fixture
def offline(monkeypatch):
    """What RULER's tasks need beside lm-eval: a list of words; and no try to download sentences' ends."""
    words = {kind: [f"{kind[:3]}{c}" for c in "abcdefgh"] for kind in ("nouns", "adjectives", "verbs")}
    stub = SimpleNamespace(RandomWord=lambda: SimpleNamespace(_categories=words))
    monkeypatch.setitem(sys.modules, "wonderwords", stub)
    monkeypatch.setattr("nltk.download", lambda *_: False)
    # lm-eval asks compilers and drivers for their versions after each evaluation, for seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.mark.slow  # four evaluations, each of which makes 500 samples
def test_every_reading_of_rulers_tasks_stands_in_the_table(folder, offline, tmp_path, capsys):
    out = tmp_path / "out"
    argv = [folder, "--plain", folder, "--out", out, "--tasks", *TASKS, "--lengths", LENGTH, "--limit", 1]
    argv = [*map(str, argv), "--window", "256", "--passes", "2", *SHORT]
    ruler.main(argv)
    names = ("fullcache", "sliding", "evicted", "asleep-N=2")
    paths = {name: next(out.glob(f"{name}-{LENGTH}-*.json")) for name in names}
    found = {name: json.loads(path.read_text()) for name, path in paths.items()}
    sleeps = [(f["sleep"]["window"], f["sleep"]["eviction"]["name"]) for f in found.values()]
    assert sleeps == [(2048, "hard"), (256, "sliding"), (256, "hard"), (256, "hard")]
    for results in found.values():
        (of_tasks,) = results["passes"].values()
        assert all(0 <= of_tasks[task][f"{LENGTH},none"] <= 1 for task in TASKS)
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert lines[0] == "| task | tokens | full cache | sliding | evicted | asleep, N = 2 |"
    assert lines[2].startswith(f"| ruler_fwe | {LENGTH} | ")
    # What is there is not measured again.
    paths["sliding"].write_text(
        json.dumps({"passes": {"1": {task: {f"{LENGTH},none": 0.5} for task in TASKS}}})
    )
    ruler.main(argv)
    again = capsys.readouterr().out.splitlines()
    assert len(again) == 3 and again[2].split(" | ")[3] == "0.50"


def test_what_was_measured_of_another_model_or_of_other_questions_is_not_taken(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    asked = [tmp_path / "one", "--window", 64, "ruler_fwe", 4]
    keys = {
        ruler.key(asked),
        ruler.key([*asked[:2], 96, *asked[3:]]),
        ruler.key([tmp_path / "two", *asked[1:]]),
    }
    assert len(keys) == 3 and ruler.key(list(asked)) in keys
    (tmp_path / "one" / "model.safetensors").write_text("other weights")
    assert ruler.key(asked) not in keys


def test_a_length_that_was_not_asked_for_is_no_figure(folder, offline, tmp_path, capsys):
    ruler.measure(
        [folder, "--window", 256, "--passes", 1, *SHORT], ["niah_single_1"], LENGTH, 1, tmp_path / "r.json"
    )
    shown = capsys.readouterr().out
    assert str(LENGTH) in shown and "4096" not in shown
