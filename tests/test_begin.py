"""What a tokenizer puts before a text stands at the beginning of a stream, whoever reads it."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import lively, same_memory, tiny
from lm_eval.api.instance import Instance
from test_reading import stopped_after
from test_session import sleeping
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lmsleep import Session, SleepConfig
from lmsleep.evaluation.facts import KEPT, Quiz, zero_shot
from lmsleep.integrations.lm_eval import SleepLM
from lmsleep.session import SessionBatch, read_files
from lmsleep.tasks import GSMInfinite, Text, batch_rng, hide_answers
from lmsleep.tasks.gsm_infinite.language import WORDS
from lmsleep.text.tokenizers import Bytes, HuggingFace

NAMES = ["<s>", "<e>", "<unknown>", "Answer", *(w for w in WORDS if w != "Answer")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("begin")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(NAMES)}, unk_token="<unknown>"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), digits])
    words.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    special = {"unk_token": "<unknown>", "eos_token": "<e>", "bos_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def words(folder):
    return HuggingFace(folder)


@pytest.fixture(scope="module")
def model():
    return lively(tiny("attention", "gated_delta_net", vocab_size=len(NAMES)))


TEXT = "The number of boats is 3. The number of rafts is the sum of 7 and 2. How many boats?"


def test_a_session_begins_with_it_once(model, words):
    sleep, tokens = sleeping(), words.encode(TEXT)
    session, plain = Session(model, sleep, words), Session(model, sleep)
    assert session.tokens(TEXT).tolist() == [0, *tokens] and not session.tokens("").numel()
    assert math.isclose(session.score(TEXT), plain.score([0, *tokens]), rel_tol=1e-9)
    for _ in range(2):  # in the midst of a stream nothing begins
        session.read(TEXT)
    plain.read([0, *tokens, *tokens])
    assert same_memory(session.memory, plain.memory, 0.0) and session.stats.tokens == 2 * len(tokens) + 1
    assert session.fork().tokens(TEXT).tolist() == tokens
    session.reset()
    assert session.tokens("<s> The").tolist() == session.tokens("The").tolist()
    batch = [session.fork(), session.fork()]
    SessionBatch(batch).read([TEXT, tokens])  # tokens are read as they are
    assert [s.stats.tokens for s in batch] == [len(tokens) + 1, len(tokens)]


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_files_are_read_as_one_text(model, words, tmp_path, monkeypatch, steps):
    files = [tmp_path / name for name in ("empty", "a", "b")]
    for file, text in zip(files, ("", TEXT, TEXT), strict=True):
        file.write_text(text)
    whole, session, save = (
        Session(model, sleeping(), words),
        Session(model, sleeping(), words),
        tmp_path / "m",
    )
    whole.read(f"{TEXT} {TEXT}")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stopped_after(patch, steps)
        read_files(session, files, save=save)
    again = Session.load(save, model, words)
    for _ in range(2):  # a second time there is nothing left to read
        read_files(again, files, save=save)
        assert again.stats.tokens == whole.stats.tokens and same_memory(again.memory, whole.memory, 1e-12)


def test_a_reading_goes_on_with_its_tokenizer_alone(model, words, tmp_path):
    (tmp_path / "a").write_text(TEXT)
    session = Session(model, sleeping(), words)
    read_files(session, [tmp_path / "a"], save=tmp_path / "m")
    session.tokenizer = Bytes()
    with pytest.raises(
        ValueError, match=r"these files as \d+ tokens, and now they are \d+; use the tokenizer"
    ):
        read_files(session, [tmp_path / "a"])


def test_documents_begin_with_it_in_training(folder, words, tmp_path):
    rows = [{"prompt": f"How many {n}?", "completion": f"{n}"} for n in range(60)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = Text(data=(tmp_path / "asked.jsonl",), tokenizer=str(folder)).batch(
        batch_rng(0, "train", 0), 4, "train"
    )
    assert asked.context is not None and (asked.context[:, 0] == 0).all() and not (asked.tokens == 0).any()
    (tmp_path / "book.txt").write_text(TEXT * 30)
    task = Text(data=(tmp_path / "book.txt",), tokenizer=str(folder), length=40)
    train, test = task._parts["train"][0][0], task._parts["test"][0][0]
    assert (
        train.tolist()[:9]
        == Session(lively(tiny(vocab_size=len(NAMES))), sleeping(), words).tokens(TEXT)[:9].tolist()
    )
    assert 0 not in train[1:] and 0 not in test and task.largest_token == max(train.max(), test.max())
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"text": "boats " * (5 + i)}) for i in range(60))
    )
    task = Text(data=(tmp_path / "rows.jsonl",), tokenizer=str(folder))
    assert all(p[0][0] == 0 for of in task._parts.values() for p in of)
    decoded = [p[0][1:].tolist() for p in task._parts["test"]]
    assert task.bytes_per_token == sum(len(words.decode(t)) for t in decoded) / sum(map(len, decoded))


def test_problems_begin_with_it(folder):
    task = GSMInfinite(tokenizer=str(folder), ops=(1, 2), length=(200, 400))
    batch = task.batch(batch_rng(0, "train", 0), 3, "train")
    assert batch.context is not None and batch.context_lengths is not None
    assert (batch.context[:, 0] == 0).all() and not (batch.context[:, 1:] == 0).any()
    assert task.largest_token < task.vocab_size == len(NAMES)
    plain = GSMInfinite(ops=(1, 2), length=(200, 400))
    for t in (task, plain):
        batch = t.batch(batch_rng(0, "train", 0), 3, "train")
        for i in range(3):
            hidden, answers = hide_answers(batch, i)
            assert t.solve(hidden) == answers


def test_pieces_of_a_probe_begin_with_it(model, words):
    L = 150
    tokens = words.encode(TEXT * 40)[: 3 * L - 1]  # one piece and no more
    [kept] = [
        r for r in zero_shot(model, words, tokens, SleepConfig(window=L), [1], samples=1) if r.way == KEPT
    ]
    with torch.no_grad():
        log_p = model(torch.tensor([[0, *tokens]]))[0].log_softmax(-1)
    wanted = -np.mean([float(log_p[t - 1, ([0, *tokens])[t]]) for t in range(L, 3 * L) if t % L])
    assert math.isclose(kept.nats, wanted, rel_tol=1e-9)
    piece = torch.tensor([0, *tokens])
    for seed in range(9):
        quiz = Quiz.draw(words, piece, L, torch.Generator().manual_seed(seed))
        assert quiz.context[0] == 0 and 0 not in quiz.context[1:] and len(quiz.context) == len(piece)


def test_lm_eval_reads_it_too(model, words):
    session = Session(model, sleeping(), words, history=0)
    lm, whole = SleepLM(session), words.tokenizer(TEXT)["input_ids"]
    assert lm.tok_encode(TEXT) == whole and lm.tok_encode(TEXT, add_special_tokens=False) == whole[1:]
    assert lm.prefix_token_id == 0 and lm.eot_token_id == 1
    score = Session(model, sleeping()).score(whole)
    asked = [Instance("x", {}, args, 0) for args in ((TEXT,), ("", TEXT), (TEXT[:3], TEXT[3:]))]
    [rolling] = lm.loglikelihood_rolling(asked[:1])
    [(empty, _), (part, _)] = lm.loglikelihood(asked[1:])
    first = session.score(TEXT[:3])
    for found in (rolling, empty, first + part):
        assert math.isclose(found, score, rel_tol=1e-9)
    [answer] = lm.generate_until([Instance("x", {}, (TEXT, {"max_gen_toks": 5}), 0)])
    assert answer == session.fork().generate(TEXT, 5)


@pytest.mark.parametrize(("bos", "prefix"), [("The", NAMES.index("The")), (None, 1)])
def test_the_prefix_is_a_bos_where_there_is_one(model, folder, bos, prefix):
    words = HuggingFace(folder)
    words.begin, words.tokenizer.bos_token = [], bos
    assert SleepLM(Session(model, sleeping(), words)).prefix_token_id == prefix
