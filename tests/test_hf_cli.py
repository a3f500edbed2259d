import io
import json
import shutil
from pathlib import Path

import pytest
from conftest import run_command
from hf_models import VOCAB, family
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmsleep import Session, SleepConfig, adapt
from lmsleep.cli.opening import SleepOptions, new_session
from lmsleep.hf import load_pretrained, sleepify
from lmsleep.integrations.lm_eval import SleepLM
from lmsleep.text.tokenizers import Spelled, load_tokenizer

SLEEP = SleepConfig(window=6, passes=3, loop=(0, 3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "tiny"
    sleepify(family("qwen3_5"), SLEEP).save_pretrained(path)
    words = Tokenizer(models.WordLevel({"</s>": 63} | {f"w{i}": i for i in range(VOCAB - 1)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(path)
    return path


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(" ".join(f"w{7 + i * i % 50}" for i in range(600)))
    return path


def session(folder, sleep=SLEEP):
    return Session(adapt(load_pretrained(folder)), sleep, load_tokenizer(str(folder)))


def test_read_and_ask(folder, tmp_path, capsys):
    book, memory = tmp_path / "book.txt", tmp_path / "book.mem"
    book.write_text(" ".join(f"w{7 + i * i % 50}" for i in range(40)))
    code, out, err = run_command(capsys, "read", folder, book, "--memory", memory)
    assert code == 0, err
    assert "40 tokens · 6 sleeps" in out
    own = session(folder)
    own.read(book.read_text())
    wanted = own.fork().generate("w9 w8", 12, stop=(63,))
    code, out, _ = run_command(capsys, "ask", folder, "w9 w8", "--memory", memory, "--max-new-tokens", 12)
    assert code == 0 and out.strip() == wanted
    code, _, err = run_command(capsys, "ask", folder, "w9", "--memory", memory, "--loop", "middle")
    assert code == 2 and "loop=middle contradicts" in err and len(err.splitlines()) == 1
    other = tmp_path / "other"
    family("qwen3_5", seed=1).save_pretrained(other)
    code, _, err = run_command(capsys, "ask", other, "w9", "--memory", memory, "--tokenizer", folder)
    assert code == 2 and "the memory of another model" in err


def test_answers_end_with_the_text(folder, tmp_path, capsys):
    own = session(folder)
    tokens = own.fork().generate("w9 w8 w7", 12).split()
    # The end of text is a word that the model would write.
    ended = tmp_path / "ended"
    shutil.copytree(folder, ended)
    made = PreTrainedTokenizerFast.from_pretrained(folder)
    made.eos_token = tokens[2]
    made.save_pretrained(ended)
    first = tokens.index(tokens[2])
    (tmp_path / "none").write_text("")
    run_command(capsys, "read", ended, tmp_path / "none", "--memory", tmp_path / "m")
    code, out, err = run_command(
        capsys, "ask", ended, "w9 w8 w7", "--memory", tmp_path / "m", "--max-new-tokens", 12
    )
    assert code == 0, err
    assert out.split() == tokens[:first]


def test_answers_end_with_all_that_the_model_ends_at(folder, tmp_path, capsys, monkeypatch):
    own = session(folder)
    tokens = own.fork().generate("w9 w8 w7", 12).split()
    ended, memory = tmp_path / "ended", tmp_path / "m"
    shutil.copytree(folder, ended)
    turn = [63, int(tokens[2][1:])]  # a turn, as chats of published models end it
    (ended / "generation_config.json").write_text(json.dumps({"eos_token_id": turn}))
    wanted = tokens[: tokens.index(tokens[2])]
    again = session(ended)
    assert again.fork().generate("w9 w8 w7", 12).split() == wanted
    assert "".join(again.fork().generate("w9 w8 w7", 12, stream=True)).split() == wanted
    assert SleepLM(again).generate_until([Instance("x", {}, ("w9 w8 w7", {}), 0)])[0].split() == wanted
    (tmp_path / "none").write_text("")
    for words in ((), ("--tokenizer", folder)):  # the ends are the model's, wherever its words come from
        memory.unlink(missing_ok=True)
        run_command(capsys, "read", ended, tmp_path / "none", "--memory", memory)
        _, out, err = run_command(
            capsys, "ask", ended, "w9 w8 w7", "--memory", memory, "--max-new-tokens", 12, *words
        )
        assert out.split() == wanted, err
    monkeypatch.setattr("sys.stdin", io.StringIO("w9 w8 w7\n"))
    _, out, _ = run_command(capsys, "chat", ended, "--max-new-tokens", 12)
    assert out.split("> ")[1].splitlines()[0].split() == wanted


def test_chat_and_inspect(folder, book, capsys, monkeypatch):
    lines = iter(["w9 w8\n", "/memory\n", "/quit\n"])
    monkeypatch.setattr("sys.stdin.readline", lambda: next(lines), raising=False)
    code, out, err = run_command(capsys, "chat", folder, "--max-new-tokens", 4)
    assert code == 0, err
    assert "window 6/6" in out or "window 0/6" in out
    code, out, err = run_command(capsys, "inspect", folder, "--text", " ".join(["w9 w8 w7 w6"] * 5), "--json")
    assert code == 0, err
    about = json.loads(out)["about"]
    assert about["window"] == 6 and about["passes"] == 3


def test_eval_on_files(folder, book, capsys):
    argv = ["eval", folder, "--data", book, "--batches", 2, "--length", 20, "--json"]
    code, out, err = run_command(capsys, *argv, "--passes", 1, 2)
    assert code == 0, err
    found = json.loads(out)["passes"]
    assert set(found) == {"1", "2"} and found["1"]["bits"] != found["2"]["bits"]
    assert found["1"]["bits_after_eviction"] > 0 and found["1"]["bits_per_byte"] > 0
    code, _, err = run_command(capsys, "eval", folder)
    assert code == 2 and "name files to read with --data" in err


def test_what_is_wrong_with_a_folder_is_said_in_one_line(folder, book, tmp_path, capsys):
    def said(change):
        path = tmp_path / "damaged"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(folder, path)
        change(path)
        code, _, err = run_command(capsys, "read", path, book, "--memory", tmp_path / "a.mem")
        assert code == 2 and len(err.splitlines()) == 1, err
        return err

    def fields(**changed):
        def change(path):
            file = path / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))

        return change

    def without_tokenizer(path):
        for file in path.glob("tokenizer*"):
            file.unlink()

    assert "holds no tokenizer; pass --tokenizer FOLDER" in said(without_tokenizer)
    assert "holds no weights" in said(lambda path: (path / "model.safetensors").unlink())
    assert "field sleep of config.json is damaged" in said(fields(sleep={"passes": "many"}))
    assert "model_type='gpt9'" in said(fields(model_type="gpt9"))
    assert "is damaged" in said(lambda path: (path / "config.json").write_text("{"))
    code, _, err = run_command(capsys, "read", folder, book, "--memory", tmp_path / "a.mem", "--loop", 0, 9)
    assert code == 2 and "loop=(0, 9) reaches outside the model" in err


def test_a_run_is_read_in_its_own_tokens_wherever_one_stands(folder, monkeypatch):
    here = new_session(Path("depo-N1"), SleepOptions()).tokenizer
    monkeypatch.chdir(folder)  # where a tokenizer lies
    assert type(new_session(Path("depo-N1"), SleepOptions()).tokenizer) is type(here) is Spelled


def test_probe(folder, book, capsys):
    code, out, err = run_command(
        capsys, "probe", folder, "--text", book, "--window", 60, "--samples", 1, "--passes", 2, "--json"
    )
    assert code == 0, err
    assert [r["reading"] for r in json.loads(out)["readings"]][-1] == "N = 2"
