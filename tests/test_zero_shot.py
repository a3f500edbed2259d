import json
import math

import pytest
import torch
from conftest import close, lively, random_tokens, run_command, tiny

from lmsleep import Session, SleepConfig
from lmsleep.evaluation import facts
from lmsleep.evaluation.facts import CHOICES, DROPPED, FACTS, KEPT, Quiz, zero_shot
from lmsleep.text.tokenizers import Bytes

L = 150
SLEEP = SleepConfig(window=L, passes=3)


@pytest.fixture(scope="module")
def model():
    return lively(tiny("attention", "gated_delta_net", vocab_size=256))


@pytest.fixture(scope="module")
def text():
    return random_tokens(3 * L, vocab=256).tolist()  # one piece and no more


def readings(model, text, passes=(1, 2), **options):
    found = zero_shot(model, Bytes(), text, SLEEP, passes, **{"samples": 1, **options})
    return {r.way: r for r in found}


def expected_nats(logits, text, counted):
    log_p = logits.log_softmax(-1)
    return -sum(log_p[t - 1, text[t]].item() for t in counted) / len(counted)


def test_a_text_is_scored_from_its_second_window_on(model, text):
    found = readings(model, text)
    counted = [t for t in range(L, 3 * L) if t % L]
    with torch.no_grad():
        whole = model(torch.tensor([text]))[0]
        alone = torch.cat([model(torch.tensor([text[a : a + L]]))[0] for a in range(0, 3 * L, L)])
    assert math.isclose(found[KEPT].nats, expected_nats(whole, text, counted), rel_tol=1e-9)
    assert math.isclose(found[DROPPED].nats, expected_nats(alone, text, counted), rel_tol=1e-9)
    for N in (1, 2):
        logits = Session(model, SLEEP.with_passes(N)).logits(text)
        assert math.isclose(found[f"N = {N}"].nats, expected_nats(logits, text, counted), rel_tol=1e-9)
    assert len({round(r.nats, 6) for r in found.values()}) == 4


@pytest.mark.parametrize("passes", [1, 3])
def test_answers_are_scored_as_a_session_scores_them(model, text, passes):
    quiz = Quiz.draw(Bytes(), torch.tensor(text), L, torch.Generator().manual_seed(1))
    sleep = SLEEP.with_passes(passes)
    session = Session(model, sleep)
    session.read(quiz.context)
    session.sleep()
    wanted = torch.tensor(
        [
            [session.score(q + c) - session.score(q) for c in cs]
            for q, cs in zip(quiz.questions, quiz.choices, strict=True)
        ]
    )
    assert close(quiz.answered(model, sleep).double(), wanted.double(), 1e-5)
    with torch.no_grad():
        unread = quiz.answered(model, None)
    fresh = Session(model, SleepConfig())
    q, c = quiz.questions[0], quiz.choices[0][0]
    assert math.isclose(float(unread[0, 0]), fresh.score(q + c) - fresh.score(q), rel_tol=1e-5)


def test_facts_stand_in_the_first_window_and_their_answers_come_first(text):
    tokens = Bytes()
    for seed in range(20):
        quiz = Quiz.draw(tokens, torch.tensor(text), L, torch.Generator().manual_seed(seed))
        assert len(quiz.context) == 3 * L
        said = bytes(quiz.context[:L].tolist())
        assert len(quiz.questions) == FACTS
        for question, choices in zip(quiz.questions, quiz.choices, strict=True):
            assert said.count(bytes(question + choices[0])) == 1
            assert len({tuple(c) for c in choices}) == CHOICES
            planted = [c for c in choices if bytes(c) in said]
            assert len(planted) == FACTS


def test_the_same_seed_gives_the_same_figures(model, text):
    long = text * 3
    a, b, c = (readings(model, long, (1,), samples=2, seed=s)[KEPT].to_dict() for s in (0, 0, 1))
    assert a == b != c
    assert (
        0 <= a["recall_interval"][0] <= a["recall"] <= a["recall_interval"][1] <= 1
        and a["questions"] == 2 * FACTS
    )


def test_what_cannot_be_tried_is_named(model, text):
    for message, change in (
        (r"window=20 is too short.*planted facts", {"sleep": SleepConfig(window=20)}),
        ("window=None evicts nothing", {"sleep": SleepConfig()}),
        ("text has 450 tokens", {"windows": 4}),
        ("windows=1", {"windows": 1}),
        ("samples=0", {"samples": 0}),
    ):
        options = {"sleep": SLEEP, "samples": 1, **change}
        with pytest.raises(ValueError, match=message):
            list(zero_shot(model, Bytes(), text, options.pop("sleep"), (1,), **options))


def test_the_command_prints_a_table_as_it_is_made_and_json(model, text, tmp_path, capsys, monkeypatch):
    model.float().save_pretrained(tmp_path / "model")
    model.double()
    (tmp_path / "text.txt").write_bytes(bytes(text))
    argv = ["probe", tmp_path / "model", "--text", tmp_path / "text.txt", "--window", L, "--samples", 1]
    written, write = [], facts.Reading.__init__

    def made(reading, **figures):
        written.append(capsys.readouterr())
        write(reading, **figures)

    monkeypatch.setattr(facts.Reading, "__init__", made)
    code, out, _ = run_command(capsys, *argv, "--passes", 1, 2)
    out = "".join(o for o, _ in written) + out
    said = f"reading 1 pieces of {3 * L} tokens of {tmp_path / 'text.txt'} in 4 ways"
    assert said in written[0][1] and not written[0][0]
    assert KEPT in written[1][0] and DROPPED in written[2][0] and "N = 1" in written[3][0]
    monkeypatch.undo()
    assert code == 0 and all(way in out for way in (KEPT, DROPPED, "N = 1", "N = 2", "chance", "Facts:"))
    code, out, _ = run_command(capsys, *argv, "--passes", 2, "--json")
    found = json.loads(out)
    assert code == 0 and [r["reading"] for r in found["readings"]] == [KEPT, DROPPED, "N = 2"]
    assert found["readings"][2]["perplexity"] > 1
    code, out, err = run_command(capsys, *argv, "--window", 30)
    assert code == 2 and "window=30 is too short" in err and len(err.splitlines()) == 1
    code, _, err = run_command(capsys, "probe", tmp_path / "no", "--text", tmp_path / "text.txt")
    assert code == 2 and "no" in err
