import io
import shutil

import pytest
from conftest import run_command
from hf_models import VOCAB, family
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lmsleep import SleepConfig
from lmsleep.hf import sleepify
from lmsleep.session.session import Session as Real
from lmsleep.text.chat import MARK, Message, Templated, chat_of
from lmsleep.text.tokenizers import Bytes, HuggingFace

# Every word of a template is a token of its own here, so that turns can be read off the stream.
TEMPLATE = (
    "{{ '<s> ' }}{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)
MARKS = ["<s>", "</s>", "<user>", "<assistant>", "<system>", "<unknown>"]
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no\nsystem here') }}{% endif %}" + TEMPLATE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "tiny"
    sleepify(family("qwen3_5"), SleepConfig(window=16, passes=2, loop=(0, 3))).save_pretrained(path)
    write(path, TEMPLATE)
    return path


def write(path, template):
    names = [*MARKS, *(f"w{i}" for i in range(VOCAB - len(MARKS)))]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    made.save_pretrained(path)


@pytest.fixture
def chat(folder, capsys, monkeypatch):
    """Run a chat; return its output, and what its session had read in the end."""
    read = []

    class Watched(Real):
        def written(self, prompt, *how):
            read.append(self.tokenizer.decode(prompt) if not isinstance(prompt, str) else prompt)
            return super().written(prompt, *how)

    monkeypatch.setattr("lmsleep.cli.opening.Session", Watched)

    def run(lines, *options, model=folder):
        read.clear()
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code, out, err = run_command(capsys, "chat", model, "--max-new-tokens", 3, *options)
        return code, out + err, list(read)

    return run


def unended(prompt):
    """A turn without the end of the answer before it, which the answer may have written itself."""
    return prompt.removeprefix("</s> ")


def test_lines_are_turns_of_the_template(chat):
    code, out, read = chat(["w1 w2", "w3"], "--system", "w9")
    assert code == 0, out
    assert read[0] == "<s> <system> w9 </s> <user> w1 w2 </s> <assistant>"
    assert (
        unended(read[1]) == "<user> w3 </s> <assistant>"
    )  # once: neither the system nor the beginning again
    _, _, read = chat(["w1"])
    assert read == ["<s> <user> w1 </s> <assistant>"]


def test_an_answer_is_closed_once(chat, folder, tmp_path):
    # Cut off by its length: the end of the message is still to be read.
    _, _, read = chat(["w1", "w2"], "--stop", "w-none")
    assert read[1].startswith("</s> <user>")
    # Written by the model: it is not read again.
    ended = tmp_path / "ended"
    shutil.copytree(folder, ended)
    made = PreTrainedTokenizerFast.from_pretrained(folder)
    _, out, _ = chat(["w1"], "--stop", "w-none")
    first = out.split("> ")[1].split()[0]  # what the model says first, made the end of a text
    made.eos_token = first
    made.chat_template = TEMPLATE.replace("</s>", first)
    made.save_pretrained(ended)
    _, out, read = chat(["w1", "w2"], model=ended)
    assert len(read) == 2 and not read[1].startswith(first)


def test_what_was_taken_back_or_slept_on_stays_one_conversation(chat):
    _, _, read = chat(["w1", "/sleep", "w2", "/undo", "/undo", "w3"], "--system", "w9")
    assert [unended(turn) for turn in read[1:]] == [
        "<user> w2 </s> <assistant>",
        "<user> w3 </s> <assistant>",
    ]
    _, _, read = chat(["w1", "/undo", "w2"], "--system", "w9")
    assert read[1] == "<s> <system> w9 </s> <user> w2 </s> <assistant>"


def test_after_a_text_or_a_file_a_conversation_begins(chat, tmp_path):
    file = tmp_path / "a.mem"
    begun = "<system> w9 </s> <user> w2 </s> <assistant>"
    for before in (["/read w7 w7"], ["w1", "/read w7"], ["w1", f"/save {file}", f"/load {file}"]):
        _, out, read = chat([*before, "w2"], "--system", "w9")
        assert read[-1] == begun, out  # without <s>: that stands at the beginning of a stream alone
    _, _, read = chat(["w2"], "--memory", file, "--system", "w9")
    assert read == [begun]


def test_a_template_that_refuses_costs_one_line(chat, folder, tmp_path):
    strict = tmp_path / "strict"
    shutil.copytree(folder, strict)
    write(strict, STRICT)
    code, out, read = chat(["w1", "/help"], "--system", "w9", model=strict)
    assert code == 0 and "the chat template refuses these messages: no" in out and "/read TEXT" in out
    assert read == []
    code, out, read = chat(["w1"], model=strict)
    assert code == 0 and len(read) == 1


def test_without_a_template_lines_are_read_as_they_are(chat, folder, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "chat_template.jinja").unlink()
    write(plain, None)
    _, _, read = chat(["w1", "w2"], model=plain)
    assert read == ["w1\n", "w2\n"]
    code, out, _ = chat(["w1"], "--system", "w9", model=plain)
    assert code == 2 and "system needs a tokenizer with a chat template" in out and len(out.splitlines()) == 1


def test_what_stands_for_an_answer_may_be_said(folder):
    chat = chat_of(HuggingFace(folder))
    assert isinstance(chat, Templated) and not isinstance(chat_of(Bytes()), Templated)
    said = chat.go_on([Message("user", f"w1 {MARK} w2")], -1)
    assert chat.tokenizer.decode(said) == "</s> <user> w1 <unknown> w2 </s> <assistant>"
