"""What SECURITY.md says of files that name code, or bring some."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import lively, run_command, tiny

from lmsleep import Memory, Session, SleepConfig
from lmsleep.text.tokenizers import HuggingFace
from lmsleep.training import RunFolder, Trainer

SLEEP = """
from dataclasses import dataclass
from pathlib import Path

from lmsleep import Consolidator

Path("was-run").touch()


@dataclass(frozen=True)
class Mine(Consolidator):
    def sleep_on(self, model, window, *, logits=True):
        return self.read(model, window, logits=logits)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop(str(tmp_path / "mine.py"), None)


def test_no_memory_file_runs_the_file_that_its_sleep_names(here, capsys):
    (here / "mine.py").write_text(SLEEP)
    model, ran = lively(tiny()), here / "was-run"
    session = Session(model, SleepConfig(window=4, consolidator="mine.py:Mine", passes=2))
    session.read([1, 2, 3])
    session.save("a.mem")
    sys.modules.pop(str(here / "mine.py"))
    ran.unlink()
    Memory.load("a.mem", model)
    assert run_command(capsys, "memory", "show", "a.mem")[0] == 0 and not ran.exists()
    for sleep in (None, SleepConfig(window=4, passes=2)):
        with pytest.raises(ValueError, match=r"its consolidator is code, .*mine.py:Mine; if you trust it"):
            Session.load("a.mem", model, sleep=sleep)
    assert not ran.exists()
    trusted = SleepConfig(window=4, consolidator="mine.py:Mine")
    assert ran.exists() and Session.load("a.mem", model, sleep=trusted).sleep_config.passes == 2


class Harmful:
    def __reduce__(self):
        return print, ("harm",)


def test_what_a_checkpoint_keeps_for_training_cannot_be_code(here, capsys):
    shutil.copytree(Path(__file__).parent / "golden/run", "run")
    folder = RunFolder.open("run")
    Trainer.take_up(folder)  # as it is
    torch.save({"optimizers": Harmful()}, folder.latest() / "trainer.pt")
    with pytest.raises(ValueError, match=r"trainer\.pt is damaged or foreign; remove .*step-00000010, and"):
        Trainer.take_up(folder)
    assert "harm" not in capsys.readouterr().out


def test_code_in_the_folder_of_a_tokenizer_is_not_run(here, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    (here / "words").mkdir()
    (here / "words/mine.py").write_text("raise SystemExit('was run')")
    told = {"auto_map": {"AutoTokenizer": ["mine.Words", None]}, "tokenizer_class": "Words"}
    (here / "words/tokenizer_config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="no tokenizer that transformers can load"):
        HuggingFace(here / "words")
