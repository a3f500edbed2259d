import json
from dataclasses import replace

import pytest
import torch
from conftest import lively, run_command, tiny

from lmsleep import Compact, GradientSteps, GradMem, HybridLM, InPlace, Memory, Passes, Session, SleepConfig
from lmsleep.cli.finetune import PRESETS
from lmsleep.cli.methods import BY, KEPT, MethodOptions
from lmsleep.cli.options import WindowOptions, chosen_sleep, sleep_field
from lmsleep.sleep import Hard, Sliding


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    # Saved models that say nothing of a sleep, and a text.
    folder = tmp_path_factory.mktemp("models")
    for name, config in {
        "recalling": tiny("attention", vocab_size=256, memory_tokens=2),
        "attention": tiny("attention", "attention", vocab_size=256),
        "hybrid": tiny(vocab_size=256),
    }.items():
        lively(config, dtype=torch.float32).save_pretrained(folder / name)
    (folder / "text.txt").write_text("the text of three windows")
    return folder


@pytest.mark.parametrize(
    ("choice", "made", "text"),
    [
        (BY, Passes(), "passes"),
        (BY, Passes(reset="S", normalize=True, wake_passes=2), "passes,reset=S,normalize=True,wake_passes=2"),
        (BY, GradMem(rate=0.5), "gradmem,rate=0.5"),
        (BY, InPlace(chunk=4), "in-place,chunk=4"),
        (KEPT, Sliding(), "sliding"),
        (KEPT, Compact(keys=9, method="norm"), "compact,keys=9,method=norm"),
    ],
)
def test_a_method_is_read_as_it_is_spelled(choice, made, text):
    assert choice.spelled(made) == text and choice.over(text, Hard()) == made


def test_a_method_named_again_keeps_what_is_not_said_and_another_begins_anew():
    own = SleepConfig(window=8, passes=3, consolidator=InPlace(rate=0.1, chunk=4))
    said = MethodOptions(sleep="in-place,rate=2").over(own)
    assert said == replace(own, consolidator=InPlace(3, rate=2, chunk=4))
    other = MethodOptions(sleep="gradmem", eviction="hard", window=9).over(own, passes=5)
    assert other == SleepConfig(window=9, consolidator=GradMem(5))
    assert MethodOptions().over(own) == own
    counted = SleepConfig(window=8, eviction=Compact(keys=9, reach=20))
    said = MethodOptions(eviction="compact,bytes=4096,keys=None").over(counted)
    assert said == replace(counted, eviction=Compact(bytes=4096, reach=20))
    looped = SleepConfig(passes=2, consolidator=Passes(2, loop=(1, 3)))
    said = MethodOptions(sleep="passes,normalize=True").over(looped)
    assert said == replace(looped, consolidator=Passes(2, loop=(1, 3), normalize=True))
    assert MethodOptions(loop="middle").over(SleepConfig(passes=2)) == SleepConfig(passes=2, loop="middle")


def test_a_default_loop_is_that_of_its_method_alone():
    default = PRESETS["lora"].sleep

    def chosen(*argv):
        _, _, windows = sleep_field(default, argv)
        return chosen_sleep(type("Options", (), {"windows": windows}), default)

    assert chosen() == default and default.consolidator.loop == "middle"
    by = chosen("--sleep", "gradient-steps,rate=3").consolidator
    assert by == GradientSteps(default.passes, rate=3)
    whole = replace(sleep_field(default, [])[2], loop=None)  # --loop None
    assert isinstance(whole, WindowOptions)
    assert chosen_sleep(type("Options", (), {"windows": whole}), default) == replace(default, loop=None)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--eviction", "compact,keys=4,bytes=4096"], "keys=4 and bytes=4096 of Compact say the same"),
        (["--sleep", "gradmem,foo=1"], "--sleep gradmem,foo=1: foo is no option of gradmem; it has rate=1.0"),
        (["--sleep", "memory-tokens,rate=1"], "rate is no option of memory-tokens; it has none"),
        (["--sleep", "gradmem,rate=-1"], "--sleep gradmem,rate=-1: rate must be finite and not negative"),
        (["--sleep", "gradmem,rate=x"], "rate must be float, got 'x'"),
        (["--sleep=passes,reset=T"], "reset must be 'S' | 'h' | None, got 'T'"),
        (["--sleep", "gradmem,passes=4"], "passes has a flag of its own, --passes"),
        (["--sleep", "gradmem,rate"], "--sleep gradmem,rate: 'rate' is no OPTION=VALUE"),
        (["--sleep", "nobody"], "--sleep nobody: unknown consolidator 'nobody'; choose one of passes, grad"),
        (["--sleep"], "Missing value for argument '--sleep'. Expected 1 values; name one of passes, "),
        (
            ["--sleep", "--passes", "2"],
            "name one of passes, gradient-steps, memory-tokens, gradmem, in-place",
        ),
        (["--eviction", "compact,keys=0"], "--eviction compact,keys=0: keys=0 of Compact keeps nothing"),
        (["--eviction", "compact,bytes=x"], "bytes must be int | None, got 'x'"),
        (["--eviction", "own.py:Mine"], "--eviction own.py:Mine: there is no file"),
        (["--consolidator", "gradmem"], "--consolidator NAME is --sleep NAME,OPTION=VALUE now"),
        (["--wake-passes", "2"], "wake_passes stands behind a comma now: --sleep passes,wake_passes=VALUE"),
        (["--normalize"], "behind a comma now: --sleep passes,normalize=VALUE (see lmsleep train mqar"),
        (["--sleep", "gradmem"], "GradMem is for models with memory tokens"),
        (["--sleep", "in-place", "--loop", "0", "1"], "loop: no option of a sleep with InPlace"),
        (
            ["--sleep", "gradmem", "--eviction", "sliding"],
            "'sliding' leaves something in attention, and with",
        ),
    ],
)
def test_a_method_that_cannot_be_is_one_line(argv, said, capsys, tmp_path):
    code, out, err = run_command(capsys, "train", "mqar", *argv, "--out", tmp_path / "run")
    assert code == 2 and said in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "run").exists()


def test_help_lists_the_methods_with_their_options(capsys):
    _, out, _ = run_command(capsys, "train", "--help")
    assert "\n  in-place,rate=1.0,chunk=None\n" in out
    assert "\n  compact,keys=None,method=attention,bytes=None,reach=4096\n" in out


def test_a_memory_goes_on_by_its_own_method_and_another_is_refused_by_name(models, capsys, tmp_path):
    model, text, memory = models / "recalling", models / "text.txt", tmp_path / "a.mem"
    how = ["--window", 8, "--passes", 2]
    code, _, err = run_command(capsys, "read", model, text, "--memory", memory, *how)
    assert code == 2 and "memory_tokens=2 are read and written by the consolidators" in err
    argv = ["read", model, text, "--memory", memory, *how, "--sleep-at-end"]
    code, out, err = run_command(capsys, *argv, "--sleep", "memory-tokens")
    assert code == 0 and "3 sleeps" not in out and "4 sleeps" in out, err
    # The file says how it was read; the model does not.
    code, _, err = run_command(capsys, "ask", model, "x", "--memory", memory)
    assert code == 0, err
    code, _, err = run_command(capsys, "ask", model, "x", "--memory", memory, "--sleep", "gradmem,rate=1")
    assert code == 2 and "sleep=gradmem contradicts" in err
    assert "which was read with sleep=memory-tokens; leave it out" in err and err.count("\n") == 1
    # A memory alone is slept on by who takes it up.
    saved = Memory.load(memory)
    saved.save(tmp_path / "S.mem")
    argv = ["ask", model, "x", "--memory", tmp_path / "S.mem", "--window", 8, "--passes"]
    code, _, err = run_command(capsys, *argv, 2, "--sleep", "gradmem")
    assert code == 2 and "S.mem was written by memory-tokens, and would be slept on by gradmem" in err
    assert run_command(capsys, *argv, 4, "--sleep", "memory-tokens")[0] == 0  # another N of the same
    loaded = HybridLM.from_pretrained(model)
    with pytest.raises(ValueError, match=r"^memory was written by memory-tokens, .* by gradmem: choose mem"):
        Session(loaded, SleepConfig(window=8, consolidator=GradMem(2)), memory=saved)
    with pytest.raises(
        ValueError, match=r"a\.mem was written with consolidator=memory-tokens, and gradmem is"
    ):
        Session.load(memory, loaded, sleep=SleepConfig(window=8, consolidator=GradMem(2)))
    code, out, _ = run_command(capsys, "memory", "show", memory, tmp_path / "S.mem")
    assert code == 0 and "method       memory-tokens, eviction hard\n" in out
    assert "method       memory-tokens\n" in out
    _, out, _ = run_command(capsys, "memory", "show", memory, "--json")
    (shown,) = json.loads(out)
    assert (shown["method"], shown["eviction"], shown["kept"]) == ("memory-tokens", "hard", 0)
    assert shown["bytes"] == 2 * 16 * 4 and [head["block"] for head in shown["heads"]] == [0]


def test_memories_of_two_methods_are_not_merged(models, capsys, tmp_path):
    files = []
    for name in ("memory-tokens", "gradmem"):
        files.append(tmp_path / f"{name}.mem")
        argv = ["read", models / "recalling", models / "text.txt", "--window", 8, "--passes", 2]
        argv += ["--memory", files[-1], "--sleep-at-end", "--sleep", name]
        assert run_command(capsys, *argv)[0] == 0
    code, _, err = run_command(capsys, "memory", "merge", *files, "--out", tmp_path / "m.mem")
    assert code == 2 and "memories that gradmem and memory-tokens wrote cannot be merged" in err
    assert not (tmp_path / "m.mem").exists()
    code, _, _ = run_command(capsys, "memory", "merge", files[1], files[1], "--out", tmp_path / "m.mem")
    assert code == 0 and Memory.load(tmp_path / "m.mem").origin.method == "gradmem"


def test_keys_that_were_kept_are_read_again_without_being_named(models, capsys, tmp_path):
    model, memory = models / "attention", tmp_path / "a.mem"
    argv = ["read", model, models / "text.txt", "--memory", memory, "--window", 8, "--passes", 1]
    code, _, err = run_command(capsys, *argv, "--eviction", "compact,keys=3,method=attended")
    assert code == 0, err
    assert run_command(capsys, "ask", model, "x", "--memory", memory)[0] == 0
    code, _, err = run_command(capsys, "ask", model, "x", "--memory", memory, "--eviction", "hard")
    assert code == 2 and "eviction=hard contradicts" in err and "read with eviction=compact" in err
    code, _, err = run_command(capsys, "ask", model, "x", "--memory", memory, "--eviction", "compact,keys=4")
    assert code == 2 and "keys=4 contradicts" in err and "read with keys=3" in err
    with pytest.raises(ValueError, match="was written with eviction=compact, and hard is asked for"):
        Session.load(memory, HybridLM.from_pretrained(model), sleep=SleepConfig(window=8))
    # Of each of two blocks: 2 heads of 3 keys and values of 8 numbers, with a bias, an age and a worth.
    size = 2 * 2 * 3 * (8 + 8 + 3) * 4
    _, out, _ = run_command(capsys, "memory", "show", memory)
    assert f"kept         {size:,} bytes, 3 keys a head\n" in out and "no fast weights" in out
    how = ["--window", 8, "--eviction"]
    _, out, _ = run_command(capsys, "info", model, *how, "compact,keys=3", "--json")
    assert json.loads(out)["kept_bytes"] == size
    _, out, _ = run_command(capsys, "info", model, *how, "sliding")
    assert f"kept by the eviction     {7 * 2 * 2 * 2 * 8 * 4:,} bytes" in out


def test_eval_and_probe_read_by_the_method_they_are_told(models, capsys, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text(" ".join(f"line {i} of a book" for i in range(300)))
    model, some = models / "hybrid", ["--window", 32, "--passes", 2, "--json"]
    argv = ["eval", model, "--data", book, "--batches", 1, *some]
    bits = {
        tuple(how): json.loads(run_command(capsys, *argv, *how)[1])["passes"]["2"]["bits"]
        for how in ((), ("--sleep", "passes,reset=S"), ("--eviction", "compact,keys=8"), ("--loop", 1, 2))
    }
    assert len(set(map(str, bits.values()))) == 4
    argv = ["probe", models / "recalling", "--text", book, "--samples", 1, "--window", 256]
    code, out, err = run_command(capsys, *argv, "--passes", 2, "--sleep", "gradmem", "--json")
    assert code == 0, err
    assert json.loads(out)["readings"][-1]["reading"] == "N = 2"
