import json
import math
import shutil
import sys

import pytest
import torch
from conftest import run_command
from gguf_files import write
from hf_models import family
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from test_hf_cli import SLEEP, folder, session  # noqa: F401

from lmsleep.cli.harness import _told
from lmsleep.integrations.lm_eval import SleepLM
from lmsleep.text.tokenizers import load_tokenizer


@pytest.fixture(autouse=True)
def no_look_at_the_machine(monkeypatch):
    # lm-eval asks compilers and drivers for their versions after each evaluation, for seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


CONTEXTS = [" ".join(f"w{7 + (i * k) % 50}" for i in range(20)) for k in (3, 7)]


def asked(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.mark.parametrize("size", [1, 3])
def test_choices_are_scored_as_a_session_scores_them(folder, size):  # noqa: F811
    own = session(folder)
    lm = SleepLM(own, batch_size=size)
    pairs = [(c, a) for a in (" w9 w8 w7 w6 w5 w4 w3 w2", " w30") for c in CONTEXTS]
    pairs.append(("", "w8 w7"))
    for (context, answer), (score, _) in zip(pairs, lm.loglikelihood(asked("x", *pairs)), strict=True):
        reader = own.fork()
        reader.read(context or [63])
        assert math.isclose(score, reader.score(answer), rel_tol=1e-4)
    likeliest = own.fork().generate(CONTEXTS[0], 3)
    found = lm.loglikelihood(asked("x", (CONTEXTS[0], " " + likeliest), (CONTEXTS[0], " w1 w2 w3")))
    assert [greedy for _, greedy in found] == [True, False]


def test_long_texts_are_scored_whole(folder):  # noqa: F811
    own = session(folder)
    found = SleepLM(own).loglikelihood_rolling(asked("x", *[(c,) for c in CONTEXTS]))
    for text, score in zip(CONTEXTS, found, strict=True):
        tokens = torch.tensor([63, *own.tokens(text).tolist()])
        log_p = own.logits(tokens).log_softmax(-1)
        assert math.isclose(score, float(log_p[:-1].gather(1, tokens[1:, None]).sum()), rel_tol=1e-4)


def test_answers_are_written_until_they_end(folder):  # noqa: F811
    own = session(folder)
    lm = SleepLM(own, batch_size=2)
    options = {"until": ["w6"], "max_gen_toks": 9, "do_sample": False, "temperature": 0.0}
    found = lm.generate_until(
        asked("x", *[(c, options) for c in CONTEXTS], (CONTEXTS[0], {"max_gen_toks": 2}))
    )
    for text, answer in zip(CONTEXTS, found, strict=False):
        assert answer == own.fork().generate(text, 9, stop=("w6", 63))
    assert found[2] == own.fork().generate(CONTEXTS[0], 2)
    with pytest.raises(ValueError, match="does not know num_beams"):
        lm.generate_until(asked("x", (CONTEXTS[0], {"num_beams": 2})))


def test_lm_eval_finds_the_model_by_name(folder):  # noqa: F811
    made = get_model("lmsleep").create_from_arg_string(f"pretrained={folder},passes=2", {"batch_size": 4})
    assert made.session.sleep_config == SLEEP.with_passes(2) and made.batches.size == 4
    with pytest.raises(ValueError, match="does not know dtype"):
        get_model("lmsleep").create_from_arg_obj({"pretrained": str(folder), "dtype": "float16"})
    with pytest.raises(ValueError, match="pretrained is missing"):
        get_model("lmsleep").create_from_arg_string("passes=2")
    with pytest.raises(ValueError, match="no chat template"):
        made.apply_chat_template([{"role": "user", "content": "w1"}])
    made.tokenizer.chat_template = "{{ raise_exception('no\\n system') }}"
    with pytest.raises(ValueError, match=r"^the chat template of the model's tokenizer: .*no system$"):
        made.apply_chat_template([{"role": "system", "content": "w1"}])


@pytest.fixture
def tasks(tmp_path):
    rows = [{"text": c, "choices": ["w9", "w30", "w12"], "label": i % 3} for i, c in enumerate(CONTEXTS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = f"""
dataset_path: json
dataset_kwargs:
  data_files: {{test: {tmp_path / "rows.jsonl"}}}
  cache_dir: {tmp_path / "cache"}
test_split: test
doc_to_text: "{{{{text}}}}"
"""
    (tmp_path / "choose.yaml").write_text(
        f"task: choose{source}output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: label\n"
        "metric_list: [{metric: acc}]\n"
    )
    (tmp_path / "write.yaml").write_text(
        f'task: write{source}output_type: generate_until\ndoc_to_target: "{{{{choices[label]}}}}"\n'
        "generation_kwargs: {until: [w1], max_gen_toks: 3}\nmetric_list: [{metric: exact_match}]\n"
    )
    return tmp_path


def test_the_command_runs_tasks_of_ones_own_without_a_network(folder, tasks, capsys):  # noqa: F811
    argv = ["lm-eval", folder, "--include-path", tasks, "--batch-size", 2, "--tasks"]
    code, out, err = run_command(
        capsys, *argv, "choose", "write", "--passes", 1, 3, "--out", tasks / "r.json"
    )
    assert code == 0, err
    assert "choose" in out and "exact_match" in out
    found = json.loads((tasks / "r.json").read_text())
    assert set(found["passes"]) == {"1", "3"} and found["sleep"]["window"] == 6
    own, right = session(folder), []
    for i, text in enumerate(CONTEXTS):
        reader = own.fork()
        reader.read(text)
        scores = [reader.score(f" {w}") for w in ("w9", "w30", "w12")]
        right.append(max(range(3), key=scores.__getitem__) == i % 3)
    assert found["passes"]["3"]["choose"]["acc,none"] == sum(right) / 2
    code, _, err = run_command(capsys, "lm-eval", folder, "--include-path", tasks / "no", "--tasks", "choose")
    assert code == 2 and "include_path: there is no folder" in err


def test_names_are_patterns_lists_and_files(folder, tasks, capsys):  # noqa: F811
    argv = ["lm-eval", folder, "--include-path", tasks, "--json", "--limit", 0.5, "--tasks"]
    for names in (["*oose", "write"], ["choose,write"], ["choose,write", "w*"]):
        code, out, err = run_command(capsys, *argv, *names)
        assert code == 0, err
        assert set(json.loads(out)["passes"]["3"]) == {"choose", "write"} and json.loads(out)["limit"] == 0.5


def test_what_is_asked_and_answered_can_be_kept(folder, tasks, capsys):  # noqa: F811
    argv = ["lm-eval", folder, "--include-path", tasks, "--tasks", "write", "--passes", 1, 3]
    argv += ["--gen-kwargs", "do_sample=true,temperature=1.0", "max_new_tokens=5", '{"until": ["w1"]}']
    kept = []
    for seed in (1, 1, 2):
        code, out, err = run_command(
            capsys, *argv, "--seed", seed, "--log-samples", tasks / "s.jsonl", "--json"
        )
        assert code == 0, err
        kept.append([json.loads(line) for line in (tasks / "s.jsonl").read_text().splitlines()])
    assert [(s["passes"], s["task"], s["doc_id"]) for s in kept[0]] == [
        (n, "write", i) for n in (1, 3) for i in (0, 1)
    ]
    # The command line's word for the length stands over the task's, whatever its name.
    assert json.loads(out)["gen_kwargs"] == {
        "do_sample": True, "temperature": 1.0, "until": ["w1"], "max_gen_toks": 5,
    }  # fmt: skip
    answers = [[s["resps"][0][0] for s in run] for run in kept]
    assert answers[0] == answers[1] != answers[2] and max(len(a.split()) for a in answers[0]) == 5


MAKES = """task: {name}
custom_dataset: !function {name}.make
test_split: test
output_type: generate_until
doc_to_text: "{{{{input}}}}"
doc_to_target: "w4"
generation_kwargs: {{until: [], max_gen_toks: 2}}
metric_list: [{{metric: exact_match}}]
{more}
"""
SIZED = """
import random
import datasets
from transformers import AutoTokenizer
def make(tokenizer=None, pretrained=None, lengths=(3,), **others):
    assert tokenizer or pretrained, "no tokenizer"
    words = AutoTokenizer.from_pretrained(tokenizer or pretrained)
    print("made by chance")
    texts = [" ".join(f"w{random.randrange(60)}" for _ in range(n)) for n in lengths]
    assert [len(words(text).input_ids) for text in texts] == list(lengths)
    return {"test": datasets.Dataset.from_list([{"input": text} for text in texts])}
"""


def of_ones_own(place, code, name="made", more=""):
    (place / f"{name}.yaml").write_text(MAKES.format(name=name, more=more))
    (place / f"{name}.py").write_text(code)
    return ["--include-path", place, "--tasks", name]


def test_the_tokenizer_of_a_gguf_file_is_told_as_a_folder(tmp_path):
    from transformers import AutoTokenizer

    words = load_tokenizer(str(write(tmp_path / "tiny.gguf", family("llama"))))
    told = _told(words, tmp_path / "told")
    assert told["pretrained"] == told["tokenizer"]
    text = "the cat sat on the mat."
    assert AutoTokenizer.from_pretrained(told["tokenizer"]).encode(text) == words.tokenizer.encode(text)


def test_tasks_that_make_their_data_are_told_the_tokenizer(folder, tmp_path, capsys):  # noqa: F811
    argv = ["lm-eval", folder, *of_ones_own(tmp_path, SIZED), "--json", "--log-samples", tmp_path / "s"]

    def asked(*more):
        code, out, err = run_command(capsys, *argv, *more)
        assert code == 0, err
        assert json.loads(out)["passes"]  # what a task prints is no part of the document
        return [json.loads(line)["doc"]["input"] for line in (tmp_path / "s").read_text().splitlines()]

    first = asked("--metadata", "lengths=[5,9]")
    assert [len(text.split()) for text in first] == [5, 9]
    assert (
        asked("--metadata", '{"lengths": [5, 9]}', "--passes", 1)
        == first
        != asked("--metadata", "lengths=[5,9]", "--seed", 3)
    )
    code, _, err = run_command(capsys, "lm-eval", "depo-N1", *argv[2:])
    assert code == 2 and err == "lmsleep: tasks: made cannot be loaded: AssertionError: no tokenizer\n"


def test_a_folder_with_code_is_told_to_no_task(folder, tmp_path, capsys):  # noqa: F811
    other = tmp_path / "coded"
    shutil.copytree(folder, other)
    file = other / "tokenizer_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "auto_map": {"AutoTokenizer": ["x.X", None]}})
    )
    code = (
        "def make(tokenizer=None, pretrained=None, **_):\n    raise ValueError(f'{tokenizer} {pretrained}')"
    )
    status, _, err = run_command(capsys, "lm-eval", other, *of_ones_own(tmp_path, code))
    assert status == 2 and "cannot be loaded: None None" in err


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'; install that package"),
        ("raise ImportError('install `ruler`\\nnow')", "install `ruler`"),
        ("def make(**given):\n    assert 0, 'no lengths'", "AssertionError: no lengths"),
        (
            "def make(**given):\n    raise ConnectionError('no Hub')",
            "no Hub; its data lie there, so a network",
        ),
        ("def make(**given):\n    raise FileNotFoundError('x.jsonl is missing')", "x.jsonl is missing"),
        ("def make(**given):\n    return {}['test']", "KeyError: 'test'"),
        (
            "import datasets as d\ndef make(**given):\n    return {'test': d.Dataset.from_list([{'a': 1}])}",
            "input",
        ),
    ],
)
def test_a_task_that_cannot_be_loaded_is_one_line_before_the_model_is(
    folder, tmp_path, capsys, monkeypatch, code, said  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr("lmsleep.cli.harness.new_session", None)
    status, out, err = run_command(capsys, "lm-eval", folder, *of_ones_own(tmp_path, code))
    assert status == 2 and not out
    assert err.splitlines()[-1].startswith("lmsleep: tasks: made cannot be loaded: ") and said in err
    assert "Traceback" not in err and len(err.splitlines()) == 1


def test_a_task_that_cannot_score_is_one_line(folder, tmp_path, capsys):  # noqa: F811
    argv = of_ones_own(
        tmp_path,
        SIZED + "def score(doc, answers):\n    return 1 / 0\n",
        more="process_results: !function made.score",
    )
    code, out, err = run_command(capsys, "lm-eval", folder, *argv)
    assert code == 2 and not out and "Traceback" not in err
    last = err.splitlines()[-1]
    assert (
        last.startswith("lmsleep: tasks: ZeroDivisionError: division by zero (in ")
        and "made.py, line" in last
    )


@pytest.mark.parametrize(
    ("more", "argv", "said"),
    [
        (
            "unsafe_code: true",
            [],
            "runs code that the model writes on this machine; --confirm-run-unsafe-code",
        ),
        ("", ["--gen-kwargs", "num_beams=3"], "does not know num_beams=3"),
        ("doc_to_image: [input]", [], "pictures"),
    ],
)
def test_a_task_that_a_sleeping_model_cannot_do_is_refused_before_the_model_is(
    folder, tmp_path, capsys, monkeypatch, more, argv, said  # noqa: F811
):  # fmt: skip
    monkeypatch.setattr("lmsleep.cli.harness.new_session", None)
    code = "import datasets as d\ndef make(**_):\n    return {'test': d.Dataset.from_list([{'input': 'w1'}])}"
    status, _, err = run_command(capsys, "lm-eval", folder, *of_ones_own(tmp_path, code, more=more), *argv)
    assert status == 2 and said in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--out", "."], "out=. is a folder; name a file"),
        (["--out", "none/r.json"], "there is no folder none"),
        (["--log-samples", "none/s"], "there is no folder none"),
        (["--use-cache", "none/c"], "there is no folder none"),
        (["--passes", 1, 0], "passes must be at least 1, got 0"),
        (["--batch-size", 0], "batch_size must be a whole number from 1, or auto, got 0"),
        (["--batch-size", "auto:x"], "batch_size must be a whole number from 1, or auto, got auto:x"),
        (["--limit", 0], "limit must be a whole number from 1, or a part"),
        (["--limit", 1.5], "limit must be a whole number from 1, or a part"),
        (["--num-fewshot", -1], "num_fewshot must not be negative, got -1"),
        (["--metadata", "lengths"], "metadata='lengths' is neither KEY=VALUE nor a JSON object"),
        (["--gen-kwargs", "{"], "gen_kwargs={: no JSON"),
        (["--include-path", "none"], "include_path: there is no folder none"),
        (["--apply-chat-template"], "no chat template"),
        (["--tokenizer", "none"], "tokenizer='none'"),
    ],
)
def test_what_is_wrong_at_first_sight_is_said_before_lm_eval_is_imported(
    folder, capsys, monkeypatch, argv, said  # noqa: F811
):  # fmt: skip
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # its import would fail
    code, _, err = run_command(capsys, "lm-eval", folder, "--tasks", "choose", *argv)
    assert code == 2 and said in err and len(err.splitlines()) == 1, err


def test_a_name_that_is_none_is_refused(folder, capsys):  # noqa: F811
    for names in ([""], ["choose,"]):
        code, _, err = run_command(capsys, "lm-eval", folder, "--tasks", *names)
        assert code == 2 and "empty" in err and len(err.splitlines()) == 1
