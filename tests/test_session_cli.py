import fcntl
import io
import json
import os
import pty
import random
import select
import subprocess
import sys
import time

import pytest
import torch
from conftest import lively, run_command, same_memory, tiny
from test_cli import TINY

import lmsleep
from lmsleep import HybridLM, Memory, Session
from lmsleep.cli import main


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    # A run, and a graph in its own words.
    folder = tmp_path_factory.mktemp("graphs")
    main(["train", "depo", "--passes", "2", "--out", str(folder / "run"), *TINY, "--threads", "1"])
    (folder / "graph.txt").write_text("n1 n2 n2 n3 n3 n4 n4 n5\nn5 n6 n6 n7 n7 n8 n8 n1\n")
    return folder


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes") / "model"
    lively(tiny(vocab_size=256), dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_graph_is_read_and_asked_about(graphs, capsys, here):
    code, out, _ = run_command(
        capsys, "read", graphs / "run", graphs / "graph.txt", "--memory", "g.mem", "--tag", "a=b"
    )
    assert code == 0 and "window 8/8 · 16 tokens · 1 sleeps" in out
    before = (here / "g.mem").read_bytes()
    code, out, _ = run_command(capsys, "ask", graphs / "run", "HOP_2 n1", "--memory", "g.mem")
    assert code == 0 and out.strip() and len(out.split()) == 1
    code, document, _ = run_command(capsys, "ask", graphs / "run", "HOP_2 n1", "--memory", "g.mem", "--json")
    assert json.loads(document)["answer"] == out.strip() and (here / "g.mem").read_bytes() == before
    assert json.loads(document)["stats"]["tokens"] == 19


def test_reading_on_forking_and_sleeping(graphs, capsys, here):
    graph, run_folder = graphs / "graph.txt", graphs / "run"
    (here / "more.txt").write_text("n1 n3")
    run_command(capsys, "read", run_folder, graph, "--memory", "g.mem")
    before = Memory.load("g.mem")
    code, out, _ = run_command(capsys, "read", run_folder, graph, "--memory", "g.mem")  # read already
    assert code == 0 and "16 tokens" in out and same_memory(Memory.load("g.mem"), before, 0.0)
    _, out, _ = run_command(
        capsys, "read", run_folder, "more.txt", "--memory", "h.mem", "--parent", "g.mem", "--sleep-at-end"
    )
    assert "window 0/8 · 18 tokens · 3 sleeps" in out
    assert Memory.load("h.mem").origin.parents == (before.origin.id,)
    _, out, _ = run_command(capsys, "read", run_folder, "more.txt", "--memory", "g.mem")  # on top
    assert "window 2/8 · 18 tokens · 2 sleeps" in out and Memory.load("g.mem").origin.id == before.origin.id


def test_memories_are_shown_compared_merged_and_traced(graphs, capsys, here):
    run_command(capsys, "read", graphs / "run", graphs / "graph.txt", "--memory", "g.mem")
    code, _, err = run_command(capsys, "memory", "merge", "g.mem", "g.mem", "--out", "m.mem")
    assert code == 2 and "8 tokens in its open window" in err
    run_command(capsys, "read", graphs / "run", graphs / "graph.txt", "--memory", "g.mem", "--sleep-at-end")
    (here / "more.txt").write_text("n1 n3")
    run_command(
        capsys, "read", graphs / "run", "more.txt", "--memory", "h.mem", "--parent", "g.mem", "--sleep-at-end"
    )
    code, out, _ = run_command(capsys, "memory", "show", "g.mem", "h.mem", "--json")
    shown = json.loads(out)
    assert code == 0 and [s["tokens"] for s in shown] == [16, 18] and len(shown[0]["heads"]) == 2
    assert shown[0]["heads"][1]["norm"] == pytest.approx(float(Memory.load("g.mem").norms()[0, 0, 1]))
    _, out, _ = run_command(capsys, "memory", "show", "g.mem")
    assert "16 tokens, 2 sleeps, N = 2" in out and "effective_rank" in out
    nbytes, model = Memory.load("g.mem").nbytes, Memory.load("g.mem").origin.model
    assert "open window  0 tokens" in out and f"fast weights {nbytes:,} bytes" in out
    assert f"slow weights the model {model}" in out
    _, out, _ = run_command(capsys, "memory", "diff", "g.mem", "h.mem", "--json")
    change = Memory.load("g.mem").diff(Memory.load("h.mem")).norms()
    assert json.loads(out)[0]["difference"] == pytest.approx(float(change[0, 0, 0]))
    code, _, _ = run_command(
        capsys, "memory", "merge", "g.mem", "h.mem", "--out", "m.mem", "--weights", 0.25, 0.75
    )
    expected = Memory.load("g.mem").merge([Memory.load("h.mem")], [0.25, 0.75])
    assert code == 0 and same_memory(Memory.load("m.mem"), expected, 1e-6)
    _, out, _ = run_command(capsys, "memory", "log", "m.mem")
    assert [line.split()[1] for line in out.splitlines()] == ["m.mem:", "g.mem:", "h.mem:"]
    _, out, _ = run_command(capsys, "ask", graphs / "run", "HOP_1 n1", "--memory", "m.mem")
    assert len(out.split()) == 1


def chat(capsys, monkeypatch, argv, *lines):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return run_command(capsys, "chat", *argv)


def test_chat_reads_answers_and_obeys(bytes_model, capsys, here, monkeypatch):
    options = [bytes_model, "--window", 16, "--passes", 2, "--max-new-tokens", 5]
    lines = ["/help", "/read hello", "how?", "/sleep", "/memory", "/save a.mem", "/fork", "/save b.mem"]
    lines += ["/load a.mem", "/load none.mem", "/nosuch", "/quit"]
    code, out, _ = chat(capsys, monkeypatch, options, *lines)
    assert code == 0 and "/read TEXT" in out and "effective_rank" in out
    assert "[window 6/16 · 6 tokens · 0 sleeps" in out and "unknown command '/nosuch'" in out
    assert "No such file" in out
    assert Memory.load("b.mem").origin.parents == (Memory.load("a.mem").origin.id,)
    session = Session.load("a.mem", HybridLM.from_pretrained(bytes_model))
    assert len(session.stream.window) == 0 and session.sleep_config.window == 16
    code, out, _ = chat(capsys, monkeypatch, [*options, "--memory", "a.mem"], "/read x")
    assert code == 0 and "[window 2/16" in out  # ends with its input


def test_chat_takes_back_line_by_line(bytes_model, capsys, here, monkeypatch):
    options = [bytes_model, "--window", 16, "--passes", 2, "--max-new-tokens", 5]
    lines = ["/read hello", "how?", "/sleep", "/undo", "/undo", "/save a.mem", "/undo", "/undo"]
    code, out, _ = chat(capsys, monkeypatch, options, *lines, "/load a.mem", "/undo")
    status = [
        line.split(" · working")[0] for line in out.splitlines() if line.startswith(("[window", "> [window"))
    ]
    counts = [line.split("[window ")[1] for line in status]
    assert code == 0 and counts[2] == counts[4]  # the answer, and the same again without the sleep
    assert counts[0] == counts[7] == counts[8] == "0/16 · 0 tokens · 0 sleeps"
    assert counts[1] == counts[5] == counts[6] == counts[9] == "6/16 · 6 tokens · 0 sleeps"
    assert out.count("there is nothing to take back") == 2


def test_chat_undoes_on_a_terminal(bytes_model, here):
    # A person at a terminal: a line, its answer, /undo; what is typed is echoed as a terminal does.
    command = [sys.executable, "-m", "lmsleep", "chat", str(bytes_model), "--window", "16"]
    mine, its = pty.openpty()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment)
    os.close(its)
    seen = b""

    def until(wanted: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 120
        while wanted not in seen:
            assert select.select([mine], [], [], max(deadline - time.monotonic(), 0))[0], seen
            seen += os.read(mine, 4096)
        seen = seen.partition(wanted)[2]

    try:
        until(b"0 tokens")
        os.write(mine, b"/help\n")
        until(b"/undo        take back")
        until(b"[window 0/16")
        os.write(mine, b"/read hello\n")
        until(b"[window 6/16")
        os.write(mine, b"/undo\n")
        until(b"[window 0/16 \xc2\xb7 0 tokens")
        os.write(mine, b"/undo\n")
        until(b"there is nothing to take back")
        os.write(mine, b"/quit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(mine)


def test_a_stray_byte_or_an_interrupt_keeps_the_session(bytes_model, capsys, here, monkeypatch):
    typed = b"/read he\xffy\nhow?\n/save a.mem\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))

    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "generate", interrupted)
    code, out, _ = run_command(capsys, "chat", bytes_model, "--window", 16)
    assert code == 0 and "interrupted" in out
    assert Session.load("a.mem", HybridLM.from_pretrained(bytes_model)).stats.tokens == len(
        "he\ufffdy\n".encode()
    )


def test_chat_leaves_a_memory_alone_that_another_process_writes(bytes_model, capsys, here, monkeypatch):
    with (here / ".m.mem.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, out, _ = chat(capsys, monkeypatch, [bytes_model], "/read x", "/save m.mem")
    assert code == 0 and "m.mem is being written by another process" in out
    assert not (here / "m.mem").exists()


def test_show_says_what_is_in_an_open_window(graphs, capsys, here):
    run_command(capsys, "read", graphs / "run", graphs / "graph.txt", "--memory", "g.mem")
    _, out, _ = run_command(capsys, "memory", "show", "g.mem")
    assert "open window  8 tokens, not in S" in out and "16 tokens, 1 sleeps" in out
    _, out, _ = run_command(capsys, "memory", "show", "g.mem", "--json")
    assert json.loads(out)[0]["open_window"] == 8 and Memory.load("g.mem").origin.tokens == 8
    run_command(capsys, "read", graphs / "run", graphs / "graph.txt", "--memory", "g.mem", "--sleep-at-end")
    _, out, _ = run_command(capsys, "memory", "show", "g.mem")
    assert "open window  0 tokens" in out and Memory.load("g.mem").origin.tokens == 16


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["read", "nowhere", "a.txt", "--memory", "m.mem"], "there is no folder nowhere"),
        (["read", "MODEL", "nosuch.txt", "--memory", "m.mem"], "nosuch.txt"),
        (["read", "MODEL", "--memory", "m.mem"], "files must name at least one"),
        (["read", "MODEL", "a.txt", "--memory", "no/where/m.mem"], "there is no folder no/where"),
        (["read", "MODEL", "a.txt", "--memory", "m.mem", "--tag", "x"], "tag must be KEY=VALUE"),
        (["read", "MODEL", "a.txt", "--memory", "a.txt"], "not a memory file of lmsleep"),
        (["read", "MODEL", "a.txt", "--memory", "."], "Is a directory"),
        (["read", "MODEL", "a.txt", "--memory", ""], "--memory is empty"),
        (["read", "MODEL", "a.txt", "--memory", "m" * 256], "name too long"),
        (["read", "MODEL", "a.txt", "--memory", "m.mem", "--tag", "a=\ud800"], "tags must map texts"),
        (["read", "MODEL", "a.txt", "--memory", "m.mem", "--passes", "1000000000000"], "at most 10,000"),
        (["read", "MODEL", "a.txt", "--memory", "old.mem", "--window", "7"], "window=7 contradicts old.mem"),
        (["read", "MODEL", "a.txt", "--memory", "m.mem", "--window", "0"], "window must be at least 1"),
        (["read", "MODEL", "a.txt", "--memory", "m.mem", "--save-every", "-1"], "save_every"),
        (["read", "RUN", "a.txt", "--memory", "m.mem"], "a.txt: 'words' is not in the task's vocabulary"),
        (["ask", "MODEL", "x", "--memory", "none.mem"], "none.mem"),
        (["ask", "RUN", "HOP_2 n1", "--memory", "old.mem"], "old.mem is the memory of another model"),
        (["ask", "MODEL", "x", "--memory", "old.mem", "--max-new-tokens", "0"], "max_new_tokens must be at"),
        (["chat", "nowhere"], "there is no folder nowhere"),
        (["memory", "nosuch"], "unknown command 'memory nosuch'"),
        (["memory", "show", "a.txt"], "not a memory file"),
        (["memory", "merge", "old.mem", "--out", "m.mem"], "two memory files or more"),
        (["memory", "merge", "old.mem", "old.mem", "--out", "old.mem"], "old.mem exists"),
    ],
)  # fmt: skip
def test_bad_input_leaves_with_2_and_writes_nothing(graphs, bytes_model, capsys, here, argv, said):
    (here / "a.txt").write_text("words")
    run_command(capsys, "read", bytes_model, "a.txt", "--memory", "old.mem", "--window", 8)
    before = {p: p.read_bytes() for p in here.iterdir()}
    argv = [{"MODEL": bytes_model, "RUN": graphs / "run"}.get(a, a) for a in argv]
    code, out, err = run_command(capsys, *argv)
    assert code == 2 and said in " ".join(err.split()) and "Traceback" not in err and not out
    assert {p: p.read_bytes() for p in here.iterdir()} == before


def test_what_a_file_says_is_printed_on_its_own_lines_and_as_json(bytes_model, capsys, here):
    model = HybridLM.from_pretrained(bytes_model)
    session = Session(model, lmsleep.SleepConfig(window=8, passes=2))
    huge = session.memory.map(lambda S: torch.full_like(S, 3e38))
    huge.save("huge.mem", tags={"a\nb": "\x1b[31mred\nmore"})
    code, out, _ = run_command(capsys, "memory", "show", "huge.mem")
    assert code == 0 and r"tag a\nb" in out and r"\x1b[31mred\nmore" in out and "\x1b" not in out
    huge.map(torch.neg).fork().save("other.mem")
    documents = [
        run_command(capsys, "memory", *argv, "--json")[1]
        for argv in (["show", "huge.mem"], ["diff", "huge.mem", "other.mem"], ["log", "huge.mem"])
    ]
    for document in documents:
        json.loads(document, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert json.loads(documents[0])[0]["heads"][0]["norm"] is None


@pytest.mark.parametrize("said", ["3", "[]", '{"tokens": "x"}',
    '{"files": 1, "tokens": 1, "begin": 0, "saved": 0}',
    '{"files": [], "tokens": 1, "begin": -1, "saved": 0}',
    '{"files": [], "tokens": "1", "begin": 0, "saved": 0}'])  # fmt: skip
def test_a_damaged_tag_of_a_reading_is_one_line(bytes_model, capsys, here, said):
    session = Session(HybridLM.from_pretrained(bytes_model), lmsleep.SleepConfig(window=8, passes=2))
    session.save("m.mem", tags={"reading": said})
    (here / "a.txt").write_text("words")
    code, _, err = run_command(capsys, "read", bytes_model, "a.txt", "--memory", "m.mem")
    assert code == 2 and "tag 'reading' is damaged" in err and err.count("\n") == 1


def test_a_memory_that_another_process_writes_is_left_alone(bytes_model, capsys, here):
    (here / "a.txt").write_text("words")
    with (here / ".m.mem.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, err = run_command(capsys, "read", bytes_model, "a.txt", "--memory", "m.mem")
    assert code == 2 and "m.mem is being written by another process" in err and not (here / "m.mem").exists()
    assert run_command(capsys, "read", bytes_model, "a.txt", "--memory", "m.mem")[0] == 0


def stop_early(capsys, monkeypatch, command, windows=16):
    # Interrupts `lmsleep read` after so many windows.
    steps, real = [], lmsleep.session.owner.advance

    def stopped(*args):
        steps.append(args)
        if len(steps) > windows:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(lmsleep.session.owner, "advance", stopped)
    assert run_command(capsys, *command)[0] == 130
    monkeypatch.setattr(lmsleep.session.owner, "advance", real)


def test_a_read_stopped_on_other_files_is_not_mixed_up(bytes_model, capsys, here, monkeypatch):
    (here / "a.txt").write_text("word " * 400)
    (here / "b.txt").write_text("other")
    command = ["read", bytes_model, "a.txt", "--memory", "m.mem", "--window", 8]
    stop_early(capsys, monkeypatch, command)
    assert Memory.load("m.mem").origin.tokens == 128  # all of it is in S; saved on the way out
    code, _, err = run_command(capsys, "read", bytes_model, "b.txt", "--memory", "m.mem")
    assert code == 2 and "stopped while it read other files" in err
    assert run_command(capsys, *command)[0] == 0 and Memory.load("m.mem").origin.tokens == 2000 - 8


def test_an_unfinished_read_skips_nothing_where_something_else_read_on(
    bytes_model, capsys, here, monkeypatch
):
    (here / "a.txt").write_text("word " * 400)
    command = ["read", bytes_model, "a.txt", "--memory", "m.mem", "--window", 8]
    stop_early(capsys, monkeypatch, command)
    for more in ("x", "x" * 2000):  # to a place within the file, and to one beyond its end
        chat(capsys, monkeypatch, [bytes_model, "--memory", "m.mem"], f"/read {more}", "/save m.mem")
        code, _, err = run_command(capsys, *command)
        assert code == 2 and "read on by something else since; read into another one" in err


def test_a_killed_read_ends_with_the_uninterrupted_memory(bytes_model, capsys, here):
    (here / "a.txt").write_bytes(random.Random(0).randbytes(4_000))
    options = ["read", str(bytes_model), "a.txt", "--window", "16", "--passes", "2", "--save-every", "0"]
    assert run_command(capsys, *options, "--memory", "whole.mem")[0] == 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lmsleep", *options, "--memory", "m.mem"]
    kills, rng = 0, random.Random(1)
    while kills < 2:
        process = subprocess.Popen(
            command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        deadline, before = time.monotonic() + 120, (here / "m.mem").stat().st_mtime_ns if kills else 0
        while time.monotonic() < deadline and process.poll() is None:
            if (here / "m.mem").exists() and (here / "m.mem").stat().st_mtime_ns > before:
                break
            time.sleep(0.002)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.wait()
        kills += 1
        Memory.load("m.mem")  # old or new, never half
    assert run_command(capsys, *options, "--memory", "m.mem")[0] == 0
    model = HybridLM.from_pretrained(bytes_model)
    whole, resumed = (Session.load(name, model) for name in ("whole.mem", "m.mem"))
    assert same_memory(resumed.stream.start.memory, whole.stream.start.memory, 0.0)
    assert resumed.stream.window.tolist() == whole.stream.window.tolist()
    assert resumed.stats.sleeps == whole.stats.sleeps and resumed.stats.tokens == 4_000
