import json
import logging
import math
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from hf_models import VOCAB, family
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmsleep import Session, SleepConfig
from lmsleep.hf import adapt, sleepify
from lmsleep.integrations.batches import Batches
from lmsleep.integrations.generation import seeds, writing
from lmsleep.integrations.lm_eval import SleepLM
from lmsleep.session.sampling import Sampling
from lmsleep.text.tokenizers import HuggingFace

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }}<x>{% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)


@pytest.fixture(autouse=True)
def no_look_at_the_machine(monkeypatch):
    # lm-eval asks compilers and drivers for their versions after each evaluation, for seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def asked(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def pieces(folder):
    # Bytes of letters and blanks, and some merges: "un" and "der" make one token, as " a" and "b" do.
    merges = [("u", "n"), ("d", "e"), ("de", "r"), ("un", "der"), ("Ġ", "a"), ("Ġa", "b"), ("Ċ", "Ċ")]
    words = ["</s>", "<x>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ċ", ".", *("".join(m) for m in merges)]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    assert len(words) <= VOCAB
    PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="</s>", additional_special_tokens=["<x>"],
        chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm-eval") / "tiny"
    # All of a request fits into one window: then nothing is slept on, and the model is the plain one.
    sleepify(family("qwen3_5"), SleepConfig(window=400, passes=3, loop=(0, 3))).save_pretrained(path)
    pieces(path)
    return path


@pytest.fixture(scope="module")
def own(folder):
    return get_model("lmsleep").create_from_arg_obj({"pretrained": str(folder)}, {"batch_size": 3})


@pytest.fixture(scope="module")
def plain(folder):
    return HFLM(pretrained=str(folder), device="cpu", batch_size=1)


PAIRS = [
    ("ab cd", " ef"), ("ab cd ", "ef"), ("a\n\n", "b.\n"), ("", "ab cd"), ("", "</s>ab"), ("ab<x>", "<x>c"),
    *((f"question {a * k}.", f" {b}") for k in (1, 9) for a in ("ab", "xyz") for b in ("ab", "under", "q")),
]  # fmt: skip


def close(found, wanted):
    for (a, greedy), (b, likeliest) in zip(found, wanted, strict=True):
        assert math.isclose(a, b, rel_tol=1e-4) and greedy == likeliest


def test_scores_and_answers_are_those_of_the_type_hf(own, plain):
    close(
        own.loglikelihood(asked("loglikelihood", *PAIRS)), plain.loglikelihood(asked("loglikelihood", *PAIRS))
    )
    texts = asked("loglikelihood_rolling", *[(c + a,) for c, a in PAIRS])
    for a, b in zip(own.loglikelihood_rolling(texts), plain.loglikelihood_rolling(texts), strict=True):
        assert math.isclose(a, b, rel_tol=1e-4)
    first = own.generate_until(asked("generate_until", ("ab cd", {"max_gen_toks": 12})))[0]
    how = [
        {"until": ["\n\n"], "max_gen_toks": 12},
        {"until": first[2:4], "max_gen_toks": 12, "do_sample": False, "temperature": 1},
        {"until": [first[5:6], first[3:5]], "max_new_tokens": 12, "num_beams": 1},
        {"until": ["</s>", "<x>"], "max_gen_toks": 12, "temperature": 0.0},
    ]
    requests = asked("generate_until", *[(c, h) for c in ("ab cd", "xyz", "under the") for h in how])
    found = own.generate_until(requests)
    assert found == plain.generate_until(requests) and len(set(found)) > 4


def tasks_in(folder):
    rows = [{"text": f"q{a} under {b}", "choices": [" ab", "n", " xyz"], "label": i % 3, "gold": "ab"}
            for i, (a, b) in enumerate([("ab", "un"), ("x", "cd"), ("y", "de"), ("z", "ab")])]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    source = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}, "
        f"cache_dir: {folder / 'cache'}}}\ntest_split: test\nfewshot_split: test\n"
        'doc_to_text: "{{text}}"\nnum_fewshot: 1\n'
    )
    (folder / "choose.yaml").write_text(
        f"task: choose\n{source}output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: label\n"
        'target_delimiter: ""\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n'
    )
    (folder / "write.yaml").write_text(
        f"task: write\n{source}output_type: generate_until\ndoc_to_target: gold\n"
        "generation_kwargs: {until: [under], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]\n"
    )
    (folder / "roll.yaml").write_text(
        f'task: roll\n{source}output_type: loglikelihood_rolling\ndoc_to_target: "{{{{text}}}}"\n'
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n".replace("num_fewshot: 1", "")
    )
    return folder


@pytest.mark.parametrize("chat", [False, True])
def test_tasks_come_out_as_with_the_type_hf(own, plain, tmp_path, chat):
    manager = TaskManager(include_path=str(tasks_in(tmp_path)), include_defaults=False)
    how = {"apply_chat_template": True, "system_instruction": "be brief"} if chat else {}
    names = ["choose", "write"] if chat else ["choose", "write", "roll"]
    a, b = (
        lm_eval.simple_evaluate(model=lm, tasks=names, task_manager=manager, bootstrap_iters=0, **how)
        for lm in (own, plain)
    )
    for name in names:
        for one, other in zip(a["samples"][name], b["samples"][name], strict=True):
            assert one["arguments"] == other["arguments"]
            if name == "write":
                assert one["resps"] == other["resps"]
            elif name == "choose":
                close([r[0] for r in one["resps"]], [r[0] for r in other["resps"]])
        for key, value in b["results"][name].items():
            if isinstance(value, float):
                assert math.isclose(a["results"][name][key], value, rel_tol=1e-4), key


def wanted(own, prefix, rest):
    tokens = torch.tensor([*prefix, *rest])
    log_p = own.session.logits(tokens).log_softmax(-1)[len(prefix) - 1 : -1]
    return float(log_p.gather(1, torch.tensor(rest)[:, None]).sum()), log_p.argmax(-1).tolist() == rest


@settings(max_examples=25)
@given(st.text("unde ab\n", max_size=6), st.text("under b\n", min_size=1, max_size=5))
def test_every_token_that_the_context_does_not_share_is_scored(own, context, text):
    whole, read = own.tok_encode(context + text), own.tok_encode(context.rstrip())
    same = next((i for i, (a, b) in enumerate(zip(whole, read)) if a != b), min(len(whole), len(read)))  # noqa: B905
    found = own.loglikelihood(asked("loglikelihood", (context, text)))
    close(found, [wanted(own, whole[:same] or [0], whole[same:])])
    assert found != [(0.0, True)]


def test_merged_choices_are_scored_by_the_merged_token(own):
    under, un = own.tok_encode("under"), own.tok_encode("un")
    assert len(under) == len(un) == 1 and under != un
    found = own.loglikelihood(asked("loglikelihood", ("un", "der"), ("x un", "der"), ("un", "ders")))
    x, s = own.tok_encode("x "), own.tok_encode("s")
    close(found, [wanted(own, [0], under), wanted(own, x, under), wanted(own, [0], under + s)])


@pytest.mark.parametrize("pair", [("ab", ""), ("", ""), ("\n", ""), ("ab ", "")])
def test_a_choice_without_tokens_is_refused(own, pair):
    if pair[0].rstrip() == pair[0]:
        with pytest.raises(ValueError, match="nothing to score"):
            own.loglikelihood(asked("loglikelihood", ("ab", "c"), pair))
    else:  # its blanks are what is asked then
        assert own.loglikelihood(asked("loglikelihood", pair))[0][0] < 0


def test_blanks_that_a_tokenizer_drops_are_no_choice_and_no_context(tmp_path):
    family("qwen3_5").save_pretrained(tmp_path)
    made = Tokenizer(models.WordLevel({"</s>": 63, "a": 1, "b": 2}, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(tmp_path)
    lm = SleepLM(Session(adapt(family("qwen3_5")), SleepConfig(window=6), HuggingFace(tmp_path)))
    with pytest.raises(ValueError, match="no token of '   ' after 'a'"):
        lm.loglikelihood(asked("loglikelihood", ("a", "   ")))
    found = lm.loglikelihood(asked("loglikelihood", *[(c, "b a") for c in ("", "\n", "   ", " \t")]))
    close(found, [wanted(lm, [63], [2, 1])] * 4)
    assert lm.generate_until(asked("generate_until", ("\n", {"max_gen_toks": 2})))


def test_nan_is_no_score(folder):
    model = family("qwen3_5")
    backbone = adapt(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = math.nan
    lm = SleepLM(Session(backbone, SleepConfig(window=400), HuggingFace(folder)))
    with pytest.raises(ValueError, match="NaN"):
        lm.loglikelihood(asked("loglikelihood", ("ab", "c")))
    with pytest.raises(ValueError, match="NaN"):
        lm.loglikelihood_rolling(asked("loglikelihood_rolling", ("abc",)))


DRAWN = {"until": [], "do_sample": True, "temperature": 1.0, "max_gen_toks": 8}


def test_repeats_are_draws_of_their_own_and_come_again_with_their_seed(folder, own):
    def draw(prompts, size=3, seed=7, **how):
        torch.manual_seed(seed)
        lm = SleepLM(own.session, batch_size=size)
        return lm.generate_until(asked("generate_until", *[(p, {**DRAWN, **how}) for p in prompts]))

    found = draw(["ab", "ab", "xyz", "ab"])
    assert len(set(found)) == 4
    # Neither the batch nor what stands beside it changes a draw.
    assert draw(["ab", "ab", "xyz", "ab"], size=1) == found
    assert draw(["xyz", "ab", "ab"]) == [found[2], *found[:2]]
    assert draw(["ab", "ab", "xyz", "ab"], seed=8) != found
    greedy = draw(["ab"] * 3, temperature=0.0)
    assert len(set(greedy)) == 1 and greedy == draw(["ab"] * 3, do_sample=False)
    assert len(set(seeds([("ab", DRAWN)] * 500))) == 500


def test_a_repeated_task_measures_several_draws(own, tmp_path):
    text = (tasks_in(tmp_path) / "write.yaml").read_text().replace("task: write", "task: often")
    text = text.replace("max_gen_toks: 6", "max_gen_toks: 6, do_sample: true, temperature: 1.0")
    filters = "repeats: 5\nfilter_list: [{name: all, filter: [{function: take_first_k, k: 5}]}]\n"
    (tmp_path / "often.yaml").write_text(text.replace("exact_match", "bypass") + filters)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def draws(seed):
        found = lm_eval.simple_evaluate(
            model=own,
            tasks=["often"],
            task_manager=manager,
            torch_random_seed=seed,
            limit=2,
            bootstrap_iters=0,
        )
        return [sample["resps"][0] for sample in found["samples"]["often"]]

    first = draws(3)
    assert all(len(set(resps)) > 1 and len(resps) == 5 for resps in first)
    assert draws(3) == first != draws(4)


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_multi_constructor("!", lambda loader, suffix, node: suffix)


def settings_of_installed_tasks():
    root = Path(lm_eval.__file__).parent / "tasks"
    for path in sorted(root.rglob("*")):
        if not path.is_file() or path.suffix not in (".yaml", ".yml", ""):
            continue
        text = path.read_bytes()
        if b"generation_kwargs" in text:
            # Only this part of the file, which is by far the fastest way to read hundreds.
            lines = text.decode().splitlines()
            at = next((i for i, line in enumerate(lines) if line.startswith("generation_kwargs:")), None)
            if at is not None:
                end = next(
                    (i for i in range(at + 1, len(lines)) if lines[i][:1] not in (" ", "", "-", "#")), None
                )
                found = yaml.load("\n".join(lines[at:end]), _Loader)["generation_kwargs"]
                if isinstance(found, dict):
                    yield str(path.relative_to(root)), found


def test_settings_of_lm_evals_own_tasks_are_taken_or_refused_by_name(caplog):
    caplog.set_level(logging.ERROR)
    seen, refused = 0, {}
    for name, settings_ in settings_of_installed_tasks():
        seen += 1
        try:
            found = writing(settings_)
        except ValueError as error:
            refused[name] = str(error)
            continue
        until = settings_.get("until") or []
        assert found["stop"] == ([until] if isinstance(until, str) else until)
        assert found["max_new_tokens"] == settings_.get("max_gen_toks", settings_.get("max_new_tokens", 256))
        sampled = settings_.get("do_sample", settings_.get("temperature", 0) > 0)
        assert found.get("temperature", 0.0) == (settings_.get("temperature", 1.0) if sampled else 0.0)
        assert found.get("top_p", 1.0) == (settings_.get("top_p", 1.0) if sampled else 1.0)
        Sampling(**{k: v for k, v in found.items() if k not in ("stop", "max_new_tokens")})
    assert seen > 400
    # Beam search alone has no counterpart.
    assert all("does not know num_beams=10" in said for said in refused.values()) and len(refused) <= 1


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ({}, {"stop": [], "max_new_tokens": 256}),
        ({"until": None, "max_gen_toks": None, "temperature": None}, {"stop": [], "max_new_tokens": 256}),
        ({"until": "a", "stop": ["b"]}, {"stop": ["a", "b"], "max_new_tokens": 256}),
        ({"max_tokens": 3}, {"stop": [], "max_new_tokens": 3}),
        ({"max_completion_tokens": 3.0}, {"stop": [], "max_new_tokens": 3}),
        ({"temperature": 0.5}, {"stop": [], "max_new_tokens": 256, "temperature": 0.5}),
        ({"do_sample": True}, {"stop": [], "max_new_tokens": 256, "temperature": 1.0}),
        ({"do_sample": False, "temperature": 1, "top_p": 0.9}, {"stop": [], "max_new_tokens": 256}),
        ({"do_sample": True, "temperature": 0}, {"stop": [], "max_new_tokens": 256, "temperature": 0}),
        ({"do_sample": True, "top_k": 0}, {"stop": [], "max_new_tokens": 256, "temperature": 1.0}),
        ({"do_sample": True, "top_k": -1}, {"stop": [], "max_new_tokens": 256, "temperature": 1.0}),
        ({"temperature": 1, "top_k": 5.0}, {"stop": [], "max_new_tokens": 256, "temperature": 1, "top_k": 5}),
        ({"num_beams": 1, "repetition_penalty": 1.0, "min_p": 0.0}, {"stop": [], "max_new_tokens": 256}),
    ],
)
def test_a_setting_is_taken(given, made):
    before = json.dumps(given)
    assert writing(given) == made and json.dumps(given) == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_beams": 2, "min_p": 0.1}, "does not know min_p=0.1, num_beams=2"),
        ({"max_length": 9}, "does not know max_length=9"),
        ({"do_sample": "false"}, "do_sample must be true or false, got 'false'"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"temperature": -1.0, "do_sample": True}, "temperature must be finite and not negative, got -1.0"),
        ({"temperature": math.nan}, "temperature must be a number, got nan"),
        ({"max_gen_toks": 0}, "max_gen_toks must be a whole number from 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number from 1, got 2.5"),
        ({"do_sample": True, "top_p": 2}, "top_p must lie in"),
        ({"do_sample": True, "top_k": -2}, "top_k must be at least 1, got -2"),
        ({"until": [3]}, "until must be texts, got 3"),
    ],
)
def test_a_setting_is_refused_by_name(own, given, said):
    with pytest.raises(ValueError, match="generation_kwargs: ") as raised:
        own.generate_until(asked("generate_until", ("ab", {}), ("ab", given)))
    assert said in str(raised.value)


def test_auto_halves_the_batch_where_memory_ends():
    tried = []

    def answer(some):
        tried.append(len(some))
        if len(some) > 10:
            raise torch.OutOfMemoryError("no memory left")
        return [2 * item for item in some]

    auto = Batches("auto:4")
    assert auto.answered(range(70), "x", answer) == [2 * i for i in range(70)]
    assert tried[:4] == [64, 32, 16, 8] and set(tried[4:]) <= {8, 6}
    with pytest.raises(torch.OutOfMemoryError):
        Batches(16).answered(range(70), "x", answer)
    assert Batches("auto", most=5).answered(range(7), "x", answer) == [2 * i for i in range(7)]


@pytest.mark.parametrize("size", [0, -1, "0", "many", "auto:", "1.5", None, True])
def test_a_batch_size_that_is_none_is_refused(folder, size):
    with pytest.raises(ValueError, match="batch_size must be a whole number from 1, or auto"):
        Batches(size)
    if size is not None:  # lm-eval's own word for "not given"
        with pytest.raises(ValueError, match="batch_size"):
            SleepLM.create_from_arg_obj({"pretrained": "none"}, {"batch_size": size})


def test_lm_evals_cache_of_answers_is_of_one_model_and_sleep(folder, own, tmp_path):
    manager = TaskManager(include_path=str(tasks_in(tmp_path)), include_defaults=False)

    def run(lm):
        return lm_eval.simple_evaluate(
            model=lm, tasks=["write"], task_manager=manager, use_cache=str(tmp_path / "cache"),
            bootstrap_iters=0,
        )["results"]  # fmt: skip

    first = run(SleepLM(own.session))
    again = SleepLM(own.session)
    again._loglikelihood_tokens = again._written = None  # nothing is asked a second time
    assert run(again) == first
    other = Session(own.session.model, own.session.sleep_config.with_passes(2), own.words)
    with pytest.raises(ValueError, match="another model or another sleep"):
        run(SleepLM(other))


def test_a_template_that_refuses_a_chat_is_one_line(own, monkeypatch):
    monkeypatch.setattr(own.tokenizer, "chat_template", "{{ raise_exception('no system here') }}")
    with pytest.raises(ValueError, match="no system here"):
        own.apply_chat_template([{"role": "system", "content": "ab"}])
