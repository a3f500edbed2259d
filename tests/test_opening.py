import subprocess
import sys

import pytest
from conftest import run_command, tiny
from hf_models import family

import lmsleep
from lmsleep import HybridLM, Session
from lmsleep.opening import open_backbone
from lmsleep.training import RunFolder

GRAPH = "n8 n4 n7 n8 n2 n5 n5 n1 n1 n6 n4 n3 n3 n2 n6 n7"


def test_a_shipped_model_reads_sleeps_and_answers_in_three_lines():
    session = Session(*lmsleep.open("depo-N4"))
    session.read(GRAPH)
    session.sleep()
    assert session.generate("HOP_3 n1", max_new_tokens=1) == "n8"


def test_a_run_a_saved_model_and_a_hugging_face_folder_open(tmp_path):
    model, sleep, tokenizer = lmsleep.open(lmsleep.shipped.find("depo-N1"))
    assert sleep.passes == 1
    assert not model.training and tokenizer.vocab_size == model.config.vocab_size
    HybridLM(tiny(vocab_size=256)).save_pretrained(tmp_path / "saved")
    family("qwen3_5").save_pretrained(tmp_path / "hub")
    model, sleep, tokenizer = lmsleep.open(tmp_path / "saved")
    assert (sleep.window, tokenizer.vocab_size, model.training) == (64, 256, False)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        lmsleep.open(tmp_path / "hub")
    model, sleep = open_backbone(tmp_path / "hub")
    assert sleep.window == 512 and not model.training


def test_opening_reads_the_configuration_of_a_run_once(monkeypatch):
    read, config = [], RunFolder.config
    monkeypatch.setattr(RunFolder, "config", lambda x: read.append(x) or config(x))
    lmsleep.open("depo-N4")
    assert len(read) == 1


def test_no_model_is_named():
    with pytest.raises(FileNotFoundError, match="depo-N1, depo-N4"):
        lmsleep.open("nothing")


@pytest.mark.parametrize("word", ["--version", "--help"])
def test_words_about_the_command_need_no_torch(word):
    code = (
        "import sys; from lmsleep.cli import main\n"
        f"try: main(['{word}'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'tyro', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_public_name_is_there_and_no_other():
    assert all(getattr(lmsleep, name) is not None for name in lmsleep.__all__)
    assert lmsleep.inspect is lmsleep.microscope.inspect
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = lmsleep.nothing


def test_a_saved_model_is_evaluated_on_texts(tmp_path, capsys):
    HybridLM(tiny(vocab_size=256)).save_pretrained(tmp_path / "saved")
    HybridLM(tiny(vocab_size=11)).save_pretrained(tmp_path / "small")
    (tmp_path / "book.txt").write_text("once upon a time " * 400)
    how = ["--data", tmp_path / "book.txt", "--batches", 1]
    code, out, err = run_command(capsys, "eval", tmp_path / "saved", *how)
    assert code == 0 and "N = 4:" in out and "bits per byte" in out, err
    for argv, said in (
        ([tmp_path / "saved"], "was trained on no task of lmsleep: name files to read with --data"),
        (
            [tmp_path / "small", *how],
            "--data in bytes holds token 117 ('u'), and the model knows 0 ... 10 alone",
        ),
        ([tmp_path, *how], "holds no model: config.json is missing"),
    ):
        code, _, err = run_command(capsys, "eval", *argv)
        assert code == 2 and said in err and err.count("\n") == 1
