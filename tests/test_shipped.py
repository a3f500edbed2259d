import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import run_command
from huggingface_hub import ModelCard
from tools import ship

from lmsleep import HybridLM, shipped
from lmsleep.cli import main
from lmsleep.evaluation import evaluate
from lmsleep.hf.adapter import is_adapter, read
from lmsleep.training import RunFolder

ADAPTERS = sorted(set(shipped.names()) - set(shipped.runs()))
GRAPH = "n8 n4 n7 n8 n2 n5 n5 n1 n1 n6 n4 n3 n3 n2 n6 n7"  # of the test split


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "graph.txt").write_text(GRAPH)
    return tmp_path


@pytest.mark.parametrize("name", shipped.runs())
def test_shipped_models_answer_held_out_graphs_as_their_card_says(name):
    run = RunFolder.open(shipped.find(name))
    config, said = run.config(), run.report()["eval"]
    found = evaluate(run.model(), config.task, config.sleep, batches=4, seed=5)  # not the report's graphs
    assert sum(found.total.values()) == 4 * 64 * 8
    assert found.accuracy >= said["accuracy"] - 0.05
    for key, accuracy in found.per_difficulty.items():
        assert accuracy >= said["per_difficulty"][str(key)] - 0.05
    row = next(line for line in (shipped.HERE / "README.md").read_text().splitlines() if name in line)
    cells = [f"{x:.3f}" for x in (*said["per_difficulty"].values(), said["accuracy"])]
    assert row.split(" | ")[-5:] == [*cells[:-1], f"{cells[-1]} |"]


def test_both_had_the_same_training_compute():
    one, four = (RunFolder.open(shipped.find(f"depo-N{n}")) for n in (1, 4))
    assert one.report()["flops"] == pytest.approx(four.report()["flops"], rel=1e-3)
    assert (one.config().sleep.passes, four.config().sleep.passes) == (1, 4)


def test_what_is_shipped_is_small_and_names_no_folder_of_the_machine_that_made_it():
    files = [path for path in shipped.HERE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    adapters = [path.with_name("adapter.safetensors") for path in files if path.parent.name in ADAPTERS]
    assert all(path.stat().st_size <= 20_000_000 for path in adapters)
    assert sum(path.stat().st_size for path in set(files) - set(adapters)) < 1_000_000
    assert {p.name for p in set(files) - set(adapters)} == {
        "__init__.py", "README.md", "config.json", "report.json", "model.safetensors"}  # fmt: skip
    texts = [path.read_text() for path in files if path.suffix in (".json", ".md")]
    assert len(texts) == 7 + 2 * len(ADAPTERS) and not any('"/' in text or " /" in text for text in texts)


def test_the_readme_shows_what_is_shipped():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    shown = re.sub("<!--.*?-->", "", readme, flags=re.S)
    for name in ("depo-N4", "smollm2-sleeps"):
        assert f"lmsleep read {name} " in readme
        assert (f"lmsleep read {name} " in shown) == (name in shipped.names())


def test_shipped_adapters_belong_to_models_by_name():
    assert {"depo-N1", "depo-N4"} == set(shipped.runs())
    for name in ADAPTERS:
        assert is_adapter(shipped.find(name))
        held, card = read(shipped.find(name)), ModelCard.load(shipped.find(name) / "README.md")
        assert "/" not in held.base.name and card.data.license and "| recipe |" in card.text


def test_more_sleep_answers_what_less_sleep_cannot(here, capsys):
    nodes, answers = {}, {}
    edges = dict(zip(GRAPH.split()[::2], GRAPH.split()[1::2], strict=True))
    for name in ("depo-N4", "depo-N1"):
        code, out, _ = run_command(capsys, "read", name, "graph.txt", "--memory", f"{name}.mem")
        assert code == 0 and "16 tokens" in out
        node, answers[name] = "n1", []
        for hops in (1, 2, 3, 4):
            node = nodes[hops] = edges[node]
            code, out, _ = run_command(capsys, "ask", name, "--memory", f"{name}.mem", f"HOP_{hops} n1")
            assert code == 0
            answers[name].append(out.strip())
    assert answers["depo-N4"] == list(nodes.values())
    assert answers["depo-N1"][0] == nodes[1] and answers["depo-N1"] != answers["depo-N4"]


def test_every_command_knows_the_shipped_names(here, capsys):
    code, out, _ = run_command(capsys, "info", "depo-N4", "--json")
    assert code == 0 and json.loads(out)["passes"] == 4
    code, out, _ = run_command(capsys, "eval", "depo-N1", "--batches", 1, "--json")
    assert code == 0 and json.loads(out)["run"] == "depo-N1"
    code, out, err = run_command(capsys, "ask", "depo-N2", "HOP_1 n1", "--memory", "g.mem")
    assert code == 2 and not out and "depo-N2; models that are shipped: depo-N1, depo-N4" in err


def test_a_folder_of_ones_own_goes_before_a_shipped_name(here, capsys):
    main(["read", "depo-N1", "graph.txt", "--memory", "g.mem"])
    shutil.copytree(shipped.find("depo-N4"), here / "depo-N1")
    assert shipped.find("depo-N1") == Path("depo-N1")
    code, _, err = run_command(capsys, "ask", "depo-N1", "HOP_1 n1", "--memory", "g.mem")
    assert code == 2 and "another model" in err


def test_a_shipped_model_can_be_made_again_from_its_run(here, monkeypatch):
    source = RunFolder.open(shipped.find("depo-N4"))
    page = (shipped.HERE / "README.md").read_text()
    (here / "shipped").mkdir()
    runs = [RunFolder.open(shipped.find(name)) for name in shipped.runs()]
    assert ship.card(runs) == page
    monkeypatch.setattr(shipped, "HERE", here / "shipped")
    made = ship.ship(source)
    assert made.path == here / "shipped/depo-N4" and not list(made.path.rglob("trainer.pt"))
    again, first = made.model().state_dict(), source.model().state_dict()
    assert isinstance(made.model(), HybridLM) and all(again[k].equal(first[k]) for k in first)
