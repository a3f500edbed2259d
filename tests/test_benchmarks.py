import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as benchmarks
from benchmarks import recall, recurrence, step, window
from benchmarks.peer import Composed
from benchmarks.processor import Processor
from benchmarks.sessions import SMALL, memories, size, stream
from benchmarks.table import as_page
from benchmarks.timing import Times, take_turns
from conftest import close

from lmsleep import SleepConfig, sleep_forward
from lmsleep.cli import bench, main
from lmsleep.evaluation import Score
from lmsleep.evaluation.cost import cost
from lmsleep.recipes.recall import COLUMNS
from lmsleep.recipes.table import published
from lmsleep.tasks.recall.task import LABELS
from lmsleep.training.held import peak_bytes

ROOT = Path(__file__).parents[1]


QUICK = ("stream", "identity", "size")


def measured(*options):
    """Return the smallest run of tables of sessions."""
    with pytest.MonkeyPatch.context() as patch:
        published = {}
        patch.setattr(benchmarks, "publish", lambda name, results: published.update(results))
        patch.setattr("builtins.print", lambda *_: None)
        benchmarks.main(["sessions", "--tiny", "--repeats", "1", "--publish", *options])
    return published


@pytest.fixture(scope="module")
def tiny():
    return measured("--only", *QUICK)


@pytest.fixture(scope="module")
def every_table():
    return measured()


def rows(result, table):
    return result[table]["rows"]


@pytest.mark.slow
def test_awake_every_n_does_the_same_work(every_table):
    assert [row["N"] for row in rows(every_table, "waking")] == [1, 2, 4, 8]
    # One repeat on a busy machine: that it is no multiple of N is enough.
    for row in rows(every_table, "waking"):
        for column in ("first token, ms", "a further token, ms"):
            assert row[column] > 0
        assert float(row["further token to N = 1"].split()[0]) < 3


@pytest.mark.slow
def test_a_longer_sleep_takes_longer(every_table):
    for L in (8, 16):
        found = {row["N"]: row["median of CPU time"] for row in rows(every_table, "pause") if row["L"] == L}
        assert found[8] > 1.5 * found[1]


@pytest.mark.slow
def test_memory_layers_are_measured_beside_generate_with_and_without_them(every_table):
    [row] = rows(every_table, "memory-layers")  # that all three answer alike is asserted where they are timed
    assert all(row[column] > 0 for column in row if "ms" in column or column.startswith("of generate"))


@pytest.mark.slow
def test_opening_is_measured_in_processes_of_their_own(every_table):
    theirs, ours = rows(every_table, "opening")
    assert (theirs["opened by"], ours["opened by"]) == ("transformers", "ours")
    for row in (theirs, ours):  # the time with a first token holds that of opening; torch alone takes 100 MB
        assert row["with its first token, CPU ms"] > row["CPU ms"] > 0 and row["peak resident, MB"] > 100


def test_measured_bytes_are_those_of_the_formula():
    window, shape = 64, size.Shape.of(SMALL)
    found = size.measured(SMALL, window=window, lengths=(64, 128, 640)).rows
    tails = 4 * 3 * SMALL.d_model * (SMALL.conv_size - 1)  # of the convolutions of queries, keys and values
    for row in found:
        assert row["sleeping: fast weights"] == shape.memory_bytes
        assert row["working memory"] == window * shape.kv_bytes(4) + tails
        assert row["transformer: whole cache"] == row["tokens read"] * 2 * shape.kv_bytes(4)  # in both blocks
        assert row["most so far"] == found[0]["most so far"]


def test_the_formula_is_that_of_lmsleep_info():
    shape, info = size.Shape.of(SMALL), cost(SMALL, SleepConfig(window=8, passes=2), dtype_bytes=2)
    assert (shape.memory_bytes, shape.kv_bytes()) == (info["fast_weight_bytes"], info["kv_bytes_per_token"])
    assert shape.break_even == info["break_even_tokens"]


def test_published_models_break_even_where_their_configurations_say():
    found = {row["model"].split()[0]: row for row in size.by_formula().rows}
    assert (found["Qwen3.5"]["their bytes"], found["Qwen3.5"]["bytes a token"]) == (24 * 2**21, 2**15)
    assert (found["Jet-Nemotron"]["their bytes"], found["Jet-Nemotron"]["bytes a token"]) == (
        27 * 2**20,
        2**11,
    )
    assert found["Ouro"]["bytes a token"] == 196_608
    for shape in size.PUBLISHED.values():
        assert shape.break_even * shape.kv_bytes() > shape.memory_bytes
        assert (shape.break_even - 1) * shape.kv_bytes() <= shape.memory_bytes


def test_memory_is_flat_along_the_stream(tiny):
    short, long = rows(tiny, "stream")
    assert (short["tokens"], long["tokens"]) == (1000, 2000)
    assert short["carried, bytes"] == long["carried, bytes"] > 0
    assert long["growth, MB"] < 8 and long["sleeps"] == (2000 - 1) // stream.SLEEP.window


def test_peak_resident_memory_sees_what_was_touched():
    before = stream.peak_resident()
    torch.ones(before // 2 + 50_000_000, dtype=torch.uint8)  # freed at once
    assert stream.peak_resident() >= before + 10_000_000


@pytest.mark.slow
def test_storage_costs_little_and_is_what_it_says(every_table):
    found = {(row["model"], row["stored as"]): row for row in rows(every_table, "storage")}
    assert [found["depo-N4", s]["bytes of S"] for s in memories.STORAGES] == [16_384, 8_192, 4_096 + 16]
    assert found["depo-N4", "float32"]["answers that differ"].startswith("0 of 512")
    for storage in memories.STORAGES:
        assert float(found["depo-N4", storage]["k=2"].split()[0]) > 0.9


@pytest.mark.slow
def test_merging_adds_facts_up_and_not_what_follows_from_them(every_table):
    found = {
        row["memory"]: [float(row[f"k={k}"].split()[0]) for k in (1, 4)]
        for row in rows(every_table, "merge")
        if row["model"] == "depo-N4"
    }
    whole, halves = found["one graph, read whole"], found["two halves of one graph, mean"]
    assert min(whole) > 0.9 and halves[0] > 0.9  # one hop: looked up
    assert halves[1] < 0.7  # four hops: nobody could derive them
    assert found["one half alone"][0] < 0.8 and found["two graphs, mean of their memories"][0] < 0.8
    assert max(found["nothing (S = 0)"]) < 0.35


def test_a_known_model_is_not_read_again(tiny):
    found = {row["call"]: row for row in rows(tiny, "identity")}
    assert list(found) == ["load", "fork", "save", "load, fork and save"]
    for row in found.values():
        assert 0 < row["least wall ms"] <= row["wall ms"]
    assert found["fork"]["CPU ms"] < found["load, fork and save"]["CPU ms"]


def test_publishing_writes_json_and_the_tables_into_the_pages(tiny, tmp_path):
    (tmp_path / "docs").mkdir()
    page = "before\n<!-- benchmark:sessions.size -->\nold\n<!-- end -->\n"
    page += "<!-- benchmark:data.speed -->\nold\n<!-- end -->\n"
    (tmp_path / "docs/a.md").write_text(page)
    benchmarks.publish("sessions", tiny, tmp_path)
    new = (tmp_path / "docs/a.md").read_text()
    assert new.startswith("before\n") and as_page(tiny["size"]) in new and new.count("old") == 1
    assert json.loads((tmp_path / "benchmarks/results/sessions.json").read_text()) == tiny
    benchmarks.publish("sessions", {"size": tiny["identity"]}, tmp_path)  # one table alone
    assert as_page(tiny["identity"]) in (tmp_path / "docs/a.md").read_text()
    kept = json.loads((tmp_path / "benchmarks/results/sessions.json").read_text())
    assert kept == {**tiny, "size": tiny["identity"]}
    assert "python -m benchmarks sessions --tiny --repeats 1 --only" in new


def test_the_documentation_shows_the_committed_results():
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    marked = len(re.findall(r"<!-- benchmark:\w[\w.-]* -->", pages))
    seen = 1  # that of the day on a GPU, which test_gpu_day.py looks at
    for result in sorted((ROOT / "benchmarks/results").glob("*.json")):
        for page in sorted((ROOT / "docs").glob("*.md")):
            text = page.read_text()
            seen += text.count(f"<!-- benchmark:{result.stem}.")
            tables = json.loads(result.read_text())
            blocks = {f"benchmark:{result.stem}.{name}": as_page(table) for name, table in tables.items()}
            assert published(text, blocks) == text
    assert seen == marked > 20


@pytest.fixture(scope="module")
def serving():
    return {name: measure() for name, measure in benchmarks.measures("serve", 1, True).items()}


def test_streams_together_say_what_generate_says(serving):
    # The benchmark itself compares the answers where nothing is evicted.
    assert [(row["context"], row["streams"]) for row in serving["together"].rows] == [
        (24, 1), (24, 2), (40, 1), (40, 2)
    ]  # fmt: skip


def test_clients_wait_for_every_n_and_for_those_who_sleep_and_read(serving):
    assert [(row["sessions"], row["N"]) for row in serving["waiting"].rows] == [
        (1, 1), (1, 4), (2, 1), (2, 4)
    ]  # fmt: skip
    for row in serving["waiting"].rows:
        assert row["sleeps"] > 0 and row["between tokens, ms"] > 0 and row["longest, in medians"] >= 1
    cases = [row["case"] for row in serving["stalls"].rows]
    assert cases == ["write alone", "others sleep", "others read"]


def test_a_debt_takes_sleeps_out_of_answers(serving):
    slept = {row["sleep"]: int(row["answers with a sleep"].split()[0]) for row in serving["policies"].rows}
    assert slept["at once"] > slept["debt L / 4 of the turn"] == 0
    assert all(row["sleeps"] > 0 for row in serving["policies"].rows)


def test_a_conversation_that_is_remembered_is_not_read_again(serving):
    for row in serving["turns"].rows:
        assert (row["times as long"] > 1) == (row["the conversation is"] == "read again")


def test_http_is_measured_beside_the_rows_in_process(serving):
    found = [row["answers"] for row in serving["http"].rows]
    assert found == ["in process", "HTTP, streamed", "HTTP, at once"]
    assert all(row["tokens/s"] > 0 for row in serving["http"].rows)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_and_send_the_same_whatever_n():
    measures = benchmarks.measures("processes", 1, True)
    assert all(row["two of one thread, ms"] > 0 for row in measures["scaling"]().rows)
    sent = [list(row.values())[1:] for row in measures["sent"]().rows]
    assert sent[0] == sent[1] == sent[2] and sent[0][2] == sent[0][3] > 0


def test_every_task_is_drawn_by_the_benchmark_of_data():
    found = benchmarks.measures("data", 1, True)["speed"]().rows
    assert {"depo", "text", "gsm-infinite, hard, reverse"} <= {row["task"] for row in found}
    assert all(row["lowest"] > 0 for row in found)


class _AsOnAGPU(Processor):
    # The path of a GPU, bfloat16 and wall time, on a CPU.
    gpu, square = True, 64

    def holds(self):
        return 2**37


# `-m slow` takes the slow ones of all of these.
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.fixture(params=["cpu", "as on a GPU", pytest.param("cuda", marks=CUDA)])
def processor(request, monkeypatch):
    if request.param == "as on a GPU":
        monkeypatch.setattr(recurrence, "kernels", recurrence.peer)
        monkeypatch.setattr(recurrence, "has_kernels", lambda: True)
        return _AsOnAGPU(torch.device("cpu"))
    return Processor(torch.device(request.param))


QUICK_SPEED = ("floors", "recurrence")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [
        *QUICK_SPEED,
        *(pytest.param(x, marks=pytest.mark.slow) for x in benchmarks.ON_ANY if x not in QUICK_SPEED),
    ],
)
def test_every_speed_benchmark_measures_what_it_names(name, processor):
    for measure in benchmarks.measures(name, 1, True, processor).values():
        table = measure()
        for row in table.rows:
            assert all(cell > 0 for cell in row.values() if isinstance(cell, float)), row
            assert ("CPU" in str((row, table.note))) == (not processor.gpu)


def test_a_gpu_computes_in_bfloat16_and_is_timed_on_the_wall():
    cpu, gpu = (kind(torch.device("cpu")) for kind in (Processor, _AsOnAGPU))
    x = torch.ones(2, 2)
    assert cpu.within(lambda: x @ x)().dtype == cpu.dtype == torch.float32
    assert gpu.within(lambda: x @ x)().dtype == gpu.dtype == torch.bfloat16
    times = Times(wall=[2.0], cpu=[1.0])
    assert (cpu.seconds(times), gpu.seconds(times)) == ([1.0], [2.0])


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of a norm in bfloat16, which a CPU does not fuse
def test_windows_that_do_not_fit_are_left_out(monkeypatch):
    def forward(model, tokens, mask, sleep, **options):
        if sleep.window is None:
            raise torch.OutOfMemoryError
        return sleep_forward(model, tokens, mask, sleep, **options)

    monkeypatch.setattr(window, "sleep_forward", forward)
    found = window.lengths(_AsOnAGPU(torch.device("cpu")), SMALL, 16, (8,), (1, 2), 1)
    assert [row["window"] for row in found.rows] == ["L = 8", "L = 8"] and "does not fit" in found.note
    assert [row["to all in parallel"] for row in found.rows] == [None, None]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["data", "--device", "cuda"], "data is measured on a CPU"),
        (["floors", "--device", "cuda"], "PyTorch sees no CUDA device"),
    ],
)
def test_a_gpu_that_cannot_be_measured_is_refused(capsys, monkeypatch, argv, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmarks.main(argv)
    assert said in capsys.readouterr().err


def test_results_of_a_gpu_are_kept_apart(monkeypatch):
    published = []
    monkeypatch.setattr(benchmarks, "publish", lambda name, results: published.append((name, *results)))
    monkeypatch.setattr(benchmarks, "Processor", lambda _: _AsOnAGPU(torch.device("cpu")))
    benchmarks.main(["floors", "--tiny", "--repeats", "1", "--publish"])
    assert published == [("floors-cuda", "limits")]


def test_calls_take_turns_and_the_first_round_is_not_counted():
    calls = []
    times = take_turns({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=2)
    assert "".join(calls) == "ababab"
    assert [len(times[name].cpu) for name in "ab"] == [2, 2]


def test_peak_bytes_are_those_of_what_lives_at_once():
    def call():
        x = torch.ones(1000)  # 4000 bytes
        y = x + 1  # 8000
        x.mul_(2)
        del x
        z = torch.cat([y, y])  # 12000
        del y, z
        torch.ones(10)

    assert peak_bytes(call) == 12_000


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("passes", [1, 3])
def test_the_peer_is_the_same_model(passes):
    setting = step.TINY
    model, batch = setting.made(), setting.drawn()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for block in model.blocks:
            if hasattr(block.mixer, "b_proj"):
                block.mixer.b_proj.bias.zero_()
    other = Composed(model)
    losses = step.ours(model, batch, setting.window, passes), step.peer(other, batch, setting.window, passes)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    for mine, theirs in ((model.embedding, other.embedding), (model.blocks[0].mlp, other.blocks[0].mlp)):
        for x, y in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert close(x.grad, y.grad, 1e-3)


def test_the_recurrences_that_are_compared_agree():
    x = recurrence.inputs(24, 8, torch.float32)
    for mine, theirs in zip(recurrence.ours(x), recurrence.peer(x), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.slow
def test_recomputed_passes_hold_hardly_more_than_one_pass():
    setting = replace(step.AUTOMATON, batch=2)
    model, batch = setting.made(), setting.drawn()
    peak = {}
    for n in (1, 4):
        for checkpoint in (False, True):
            loss = partial(step.ours, model, batch, setting.window, n, checkpoint=checkpoint)
            loss().backward()  # gradients are there from now on, and not counted
            peak[n, checkpoint] = peak_bytes(lambda loss=loss: loss().backward())
    assert peak[4, False] > 3 * peak[1, False]
    assert peak[4, True] < 1.6 * peak[1, True] < 1.6 * peak[1, False]


def test_the_command_line_runs_them_from_any_folder(tmp_path):
    command = "from lmsleep.cli import main; main(['bench', 'data', '--tiny', '--repeats', '1', '--json'])"
    made = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, capture_output=True, check=True)
    assert json.loads(made.stdout)["speed"]["rows"]


@pytest.mark.parametrize(
    ("missing", "said"), [("sources", "clone the repository"), ("transformers", "lmsleep[hf]")]
)
def test_what_the_command_needs_is_named(capsys, monkeypatch, tmp_path, missing, said):
    if missing == "sources":
        monkeypatch.setattr(bench, "SOURCES", tmp_path)
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "floors"])
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "name"),
        (["nosuch"], "nosuch"),
        (["data", "--repeats", "x"], "--repeats"),
        (["data", "--repeats", "0"], "--repeats"),
        (["data", "--device", "xpu"], "--device"),
        (["data", "--device", "cuda"], "--device"),
        (["data", "--only", "no\nthing"], "--only"),
        (["data", "--bogus"], "--bogus"),
    ],
)
def test_what_does_not_fit_is_one_line(argv, said, capsys):
    with pytest.raises(SystemExit) as leaving:
        benchmarks.main(argv)
    out, err = capsys.readouterr()
    assert leaving.value.code == 2 and not out and said in err and err.count("\n") == 1


def test_recall_is_asked_of_every_reading_by_kind_of_question(capsys):
    benchmarks.main(["recall", "--tiny", "--repeats", "1", "--json"])
    rows = json.loads(capsys.readouterr().out)["kinds"]["rows"]
    assert len({row["bits"] for row in rows}) == len(rows) == 5  # no two readings are one
    first, second, problem = (LABELS.index(name) for name in ("color", "place", "op1"))
    found = recall._columns(
        Score(correct={problem: 1, first: 0, second: 3}, total={problem: 1, first: 2, second: 3})
    )
    assert [*found] == [*COLUMNS]
    asked = {name: cell[:4] for name, cell in found.items() if cell is not None}
    assert asked == {"facts": "0.60", "problems": "1.00"}
