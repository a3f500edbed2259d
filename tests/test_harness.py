import json
import math

import pytest
import torch
from conftest import run_command
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from test_hf_cli import SLEEP, folder, session  # noqa: F401

from lmsleep.integrations.lm_eval import SleepLM

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
    assert made.session.sleep_config == SLEEP.with_passes(2) and made.batch_size == 4
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
