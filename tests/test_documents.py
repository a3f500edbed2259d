import json
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import close, lively, run_command, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmsleep import SleepConfig, sleep_forward
from lmsleep.evaluation import evaluate
from lmsleep.tasks import Text, batch_rng
from lmsleep.tasks.reading import read_batch
from lmsleep.tasks.samples import EVICTED, records, show
from lmsleep.text.documents import read_set
from lmsleep.text.packing import POOL, alike, pad
from lmsleep.text.splits import split_of, splits_of
from lmsleep.text.tokenizers import HuggingFace

datasets.disable_progress_bars()
WORDS = ["the", "pond", "has", "frogs", "many", "few", "[UNK]"]


@pytest.fixture
def tokenizer(tmp_path):
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="[UNK]", model_max_length=16, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)
    return str(folder)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(n=60):
    return [{"text": f"{i:03d} " * (1 + i % 23)} for i in range(n)]


def questions(n=60):
    return [{"question": f"{i:03d}? " * (1 + i % 9), "answer": str(i * i)} for i in range(n)]


@pytest.fixture
def text_set(tmp_path):
    return write_rows(tmp_path / "texts.jsonl", texts())


@pytest.fixture
def question_set(tmp_path):
    return write_rows(tmp_path / "questions.jsonl", questions())


def draw(task, size=8, split="train", index=0):
    return task.batch(batch_rng(0, split, index), size, split)


# Reading


def test_rows_are_held_out_by_their_hash_whatever_stands_beside_them(tmp_path, text_set):
    splits = {d.fields: d.split for d in read_set(text_set)}
    more = {d.fields: d.split for d in read_set(write_rows(tmp_path / "more.jsonl", texts(2000)[::-1]))}
    assert splits.items() <= more.items()
    share = sum(split == "test" for split in more.values()) / len(more)
    assert abs(share - 0.1) < 4 * np.sqrt(0.09 / 2000)


def test_a_prompt_is_never_in_both_splits(tmp_path):
    rows = [{"prompt": f"p{i % 50}", "completion": f"c{i}"} for i in range(400)]
    splits: dict = {}
    for (prompt, _), split in read_set(write_rows(tmp_path / "a.jsonl", rows)):
        splits.setdefault(prompt, set()).add(split)
    assert len(splits) == 50 and all(len(found) == 1 for found in splits.values())


@pytest.mark.parametrize(
    ("row", "fields", "read"),
    [
        ({"text": "t", "question": "q", "answer": 7}, (), ("q", "7")),
        ({"completion": "c", "prompt": "p"}, (), ("p", "c")),
        ({"text": "t", "id": 1}, (), ("t",)),
        ({"text": "t", "id": 1.5}, ("id",), ("1.5",)),
        ({"in": "i", "out": "o", "text": "t"}, ("in", "out"), ("i", "o")),
    ],
)
def test_fields_are_found_or_named(tmp_path, row, fields, read):
    [document] = read_set(write_rows(tmp_path / "a.jsonl", [row]), fields)
    assert document.fields == read


def test_a_folder_of_datasets_reads_like_the_same_rows_as_json_lines(tmp_path, question_set):
    datasets.Dataset.from_list(questions()).save_to_disk(tmp_path / "set")
    assert list(read_set(tmp_path / "set")) == list(read_set(question_set))


def save_splits(folder, splits):
    parts = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(parts).save_to_disk(folder)
    return folder


def test_the_splits_of_a_folder_are_kept(tmp_path):
    rows = texts(12)
    parts = {"train": rows[:6], "validation": rows[6:9], "other": rows[9:]}
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()}).save_to_disk(
        tmp_path / "set"
    )
    kept = [(d.fields[0], d.split) for d in read_set(tmp_path / "set")]
    assert kept == [(r["text"], "train") for r in rows[:6]] + [(r["text"], "test") for r in rows[6:9]]


HELD_OUT_NAMES = [
    "test", "validation", "valid", "val", "dev", "eval", "test_sft", "dev2", "validation_matched", "heldOut",
    "held_out", "test-00000-of-00001", "testset", "test.clean",
]  # fmt: skip


@pytest.mark.parametrize("trained", ["train", "train_sft", "training", "train.clean.100"])
@pytest.mark.parametrize("held_out", HELD_OUT_NAMES)
def test_names_of_splits_say_what_is_held_out(trained, held_out):
    assert splits_of([trained, "other", held_out]) == {trained: "train", held_out: "test"}
    assert splits_of([trained, "other"]) == splits_of([held_out, "other"]) == splits_of(["other"]) == {}
    assert split_of("pretrained") is split_of("contest") is split_of("devil") is None


@pytest.mark.parametrize("held_out", ["test", "test_sft", "dev", "eval"])
def test_held_out_splits_of_a_folder_are_never_trained_on(tmp_path, held_out):
    rows = texts(60)
    names = {"train_sft": rows[:20], "train_more": rows[20:40], held_out: rows[40:]}
    for document in read_set(save_splits(tmp_path / "set", names)):
        assert document.split == ("test" if {"text": document.fields[0]} in rows[40:] else "train")


@pytest.mark.parametrize("names", [["test"], ["test", "validation"], ["en", "de"], ["en", "test"]])
def test_splits_that_no_name_explains_are_refused_and_can_be_named_alone(tmp_path, names):
    folder = save_splits(tmp_path / "set", dict.fromkeys(names, texts(40)))
    with pytest.raises(ValueError, match=f"splits {', '.join(names)}, of which none is called train"):
        list(read_set(folder))
    assert {d.split for d in read_set(folder / names[0])} == {"train", "test"}


def test_a_folder_with_one_split_or_rows_for_training_alone_is_held_out_by_hash(tmp_path, text_set):
    by_hash = list(read_set(text_set))
    assert list(read_set(save_splits(tmp_path / "a", {"en": texts()}))) == by_hash
    assert list(read_set(save_splits(tmp_path / "b", {"train": texts(), "more": texts()}))) == by_hash


@pytest.mark.parametrize("names", [["train", "test"], ["a/train/1", "a/dev/1"], ["gsm_train", "x/gsm_eval"]])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_files_called_train_and_test_are_kept_apart(tmp_path, names, kind):
    paths = [tmp_path / f"{name}.{kind}" for name in names]
    for path, letter in zip(paths, "ab", strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "jsonl":
            write_rows(path, [{"text": letter * 20 + f" {i}"} for i in range(40)])
        else:
            path.write_text(letter * 1000)
    for data in (paths, paths[::-1]):
        task = Text(data=tuple(data), length=20)
        assert {chr(t) for t in draw(task, 60).tokens[:, 1].tolist()} == {"a"}
        assert {chr(t) for t in draw(task, 60, "test").tokens[:, 1].tolist()} == {"b"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            '{"text": "a", "score": NaN}\n{"text": "b\\ud83d"}\n',
            r"line 2: field 'text': character 2 is half a sur",
        ),
        (
            '{"prompt": "\\udc00", "completion": "b"}\n',
            r"line 1: field 'prompt': character 1 is half a surrogate",
        ),
        ('{"question": "a", "answer": NaN}\n', r"line 1: field 'answer' must be text or a number, got nan"),
        ('{"question": "a", "answer": -Infinity}\n', r"line 1: field 'answer' must be .* got -inf"),
        ('{"question": "a", "answer": 1e999}\n', r"line 1: field 'answer' must be .* got inf"),
        ('{"question": "a", "answer": null}\n', r"line 1: field 'answer' must be .* got NoneType"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}\n',
            r"line 1: field 'messages' is a conversation, which",
        ),
        ('{"messages": [{"from": "user", "value": "a"}]}\n', r"must have role and content, got from, value"),
        (
            '{"prompt": [{"role": "user", "content": "a"}], "completion": "a"}\n',
            r"must be texts; of a conversation",
        ),
        ('{"messages": []}\n', r"line 1: field 'messages' must be text or a number, got list"),
        ('{"text": "a"}\n\n{"text": \n', r"rows\.jsonl, line 3: not JSON"),
        (b'{"text": "\xff"}\n', r"rows\.jsonl, line 1: not JSON"),
        ('["a"]\n', r"line 1: must be a JSON object, got list"),
        ('{"text": "a"}\n{"txt": "b", "id": 1}\n', r"line 2: no field 'text'; there are txt, id"),
        ('{"txt": "b", "id": 1}\n', r"line 1: none of question/answer, .* fields txt, id; name"),
        ('{"text": ["b"]}\n', r"line 1: field 'text' must be text or a number, got list"),
        ('{"prompt": "b", "completion": ""}\n', r"line 1: completion is empty"),
        ("", r"no document for the train split"),
        ('{"text": "a"}\n' * 50, r"no document for the \w+ split .*must hold more"),
    ],
)
def test_bad_rows_are_named_with_their_line(tmp_path, content, said):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=said):
        draw(Text(data=(path,)))


def test_sources_that_do_not_fit_are_refused(tmp_path, text_set, question_set):
    book = tmp_path / "book.txt"
    book.write_text("word " * 1000)
    (tmp_path / "empty").mkdir()
    for data, options, said in (
        ((book, text_set), {}, "not both"),
        ((text_set, question_set), {}, "some rows are texts and some prompts"),
        ((text_set,), {"fields": ("a", "b", "c")}, "one .text. or two"),
        ((tmp_path / "empty",), {}, "is no folder that datasets can load"),
        ((tmp_path / "nowhere.jsonl",), {}, r"nowhere\.jsonl is not a file"),
        ((book,), {"tokenizer": str(tmp_path / "empty")}, "holds no tokenizer"),
    ):
        with pytest.raises(ValueError, match=said):
            draw(Text(data=data, **options))


# Tokens


def test_a_file_in_the_tokens_of_a_tokenizer(tmp_path, tokenizer, caplog):
    rng = np.random.default_rng(0)
    words = [WORDS[i] for i in rng.integers(0, 6, 900)] + ["few"] * 100
    book = tmp_path / "book.txt"
    book.write_text(" ".join(words))
    with caplog.at_level(logging.WARNING):
        task = Text(data=(book,), tokenizer=tokenizer, length=20)
    assert not caplog.records  # nothing about the length that the tokenizer was made for
    assert task.vocab_size == 7 and task.unit == "token"
    for row in draw(task).tokens.tolist():
        assert task.spell(row) in " ".join(words)
    assert set(draw(task, split="test").tokens.unique().tolist()) == {WORDS.index("few")}
    assert task.bytes_per_token == (100 * 4 - 1) / 100
    assert task.floors()["chance"] == 1 / 7


CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def test_a_conversation_is_written_by_the_chat_template(tmp_path, tokenizer):
    asked = [{"role": "user", "content": f"the pond {i}"} for i in range(60)]
    rows = [{"messages": [m, {"role": "assistant", "content": "few frogs", "name": None}]} for m in asked]
    lines = write_rows(tmp_path / "chat.jsonl", rows)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "chat")
    with pytest.raises(ValueError, match=r"line 1: field 'messages': .* template, and this one has none"):
        draw(Text(data=(lines,), tokenizer=tokenizer))
    found = HuggingFace(Path(tokenizer))
    found.tokenizer.chat_template = CHAT
    found.tokenizer.save_pretrained(tokenizer)
    read = list(read_set(lines, chat=HuggingFace(Path(tokenizer)).chat))
    assert read == list(read_set(tmp_path / "chat", chat=found.chat)) and len({d.split for d in read}) == 2
    assert read[7].fields == ("user: the pond 7\nassistant: few frogs\n",)
    task = Text(data=(lines,), tokenizer=tokenizer)
    assert not task.asks and "few frogs" in task.spell(draw(task, 1).row(0)[1])
    # What a template refuses is said of the row.
    found.tokenizer.chat_template = "{{ raise_exception('no roles here') }}"
    with pytest.raises(ValueError, match=r"chat\.jsonl, line 1: field 'messages': no roles here"):
        list(read_set(lines, chat=found.chat))


def test_equal_questions_of_conversations_are_in_one_split(tmp_path):
    def row(i, answer):
        return {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": answer}]}

    rows = [row(i, answer) for i in range(60) for answer in ("yes", "no")]
    read = list(read_set(write_rows(tmp_path / "a.jsonl", rows), chat=str))
    assert [d.split for d in read[::2]] == [d.split for d in read[1::2]]


def test_a_tokenizer_needs_text(tmp_path, tokenizer):
    path = tmp_path / "latin.txt"
    path.write_bytes("Frösche ".encode("latin-1") * 99)
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        draw(Text(data=(path,), tokenizer=tokenizer))


# Packing


def test_documents_are_drawn_by_their_weight_and_come_with_others_of_their_length():
    rng = np.random.default_rng(0)
    lengths, weights = rng.integers(1, 100, 40), rng.integers(1, 4, 40).astype(float)
    counts, spread, everything = np.zeros(40), [], []
    for index in range(2000):
        chosen = alike(batch_rng(0, "train", index), lengths, 16, weights)
        counts += np.bincount(chosen, minlength=40)
        spread.append(np.ptp(lengths[chosen]))
        everything.append(lengths[chosen].mean())
    expected = counts.sum() * weights / weights.sum()
    assert np.abs(counts / expected - 1).max() < 0.25  # 3 standard errors; unweighted: 0.5
    assert np.mean(spread) < 3 * 100 / POOL < np.ptp(lengths)
    assert np.ptp(everything) > 50  # all lengths occur


def test_padding_is_little(text_set, question_set):
    for path in (text_set, question_set):
        task, real, read = Text(data=(path,)), 0, 0
        for index in range(60):
            batch = draw(task, 16, index=index)
            real += batch.num_tokens
            read += batch.tokens.numel() + (0 if batch.context is None else batch.context.numel())
        assert real / read > 0.8


def test_rows_of_one_length_need_no_padding():
    tokens, lengths = pad([np.arange(37)] * 3)
    assert tokens.shape == (3, 37) and lengths is None
    tokens, lengths = pad([np.arange(37), np.arange(30)])
    assert tokens.shape == (2, 40) and lengths.tolist() == [37, 30] and not tokens[1, 30:].any()


def test_rows_of_a_set_are_whole_documents_or_excerpts_of_long_ones(text_set):
    task = Text(data=(text_set,), length=50)
    rows = {row["text"] for row in texts()}
    for index in range(20):
        batch = draw(task, index=index)
        for number in range(8):
            _, tokens, answers = batch.row(number)
            spelled = task.spell(tokens)
            assert spelled in rows if len(tokens) < 50 else any(spelled in row for row in rows)
            assert answers[0] == -1 and min(answers[1:]) >= 0
            assert batch.loss_mask[number].sum() == len(tokens) - 1


def test_the_held_out_rows_are_others(text_set):
    task = Text(data=(text_set,), length=100)
    seen = {
        split: {task.spell(draw(task, 1, split, i).row(0)[1]) for i in range(200)}
        for split in ("train", "test")
    }
    assert seen["train"] and seen["test"] and not seen["train"] & seen["test"]


def test_a_prompt_is_context_and_the_answer_a_row_with_a_beginning_of_its_own(question_set):
    task = Text(data=(question_set,))
    known = {row["question"]: row["answer"] for row in questions()}
    assert task.asks and task.vocab_size == 258
    batch = draw(task)
    assert batch.difficulty.tolist() == [0] * 8 and not batch.loss_mask[:, 0].any()
    for number in range(8):
        context, tokens, answers = batch.row(number)
        answer = known[task.spell(context)]
        assert task.spell(tokens) == f"<answer>{answer}<end>"
        assert answers == [-1] + [number] * (len(answer) + 1)
        assert batch.loss_mask[number].nonzero()[:, 0].tolist() == list(range(1, len(tokens)))
    assert (task.vocab_size - 2, task.vocab_size - 1) == (task.marks.answer[0], tokens[-1])
    assert task.floors()["chance"] == 1 / sum(
        d.split == "train" for d in read_set(question_set)
    )  # all answers differ


def test_an_answer_ends_as_texts_of_the_tokenizer_do(question_set, tmp_path):
    plain = Tokenizer(models.WordLevel({"[UNK]": 0, "<s>": 1, "1": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", eos_token="<s>").save_pretrained(
        tmp_path / "words"
    )
    task = Text(data=(question_set,), tokenizer=str(tmp_path / "words"))
    _, tokens, answers = draw(task).row(0)
    assert (task.vocab_size, task.marks.end) == (3, 1) and tokens[-1] == 1
    begin = len(task.marks.answer)
    assert answers == [-1] * begin + [0] * (len(tokens) - begin) and tokens[:begin] == task.marks.answer


def test_samples_show_rows_without_their_padding(question_set, text_set):
    for path, everything in ((question_set, False), (text_set, True)):
        task = Text(data=(path,))
        batch = draw(task)
        for number, record in enumerate(records(task, batch)):
            context, tokens, _ = batch.row(number)
            assert (record["context"], record["tokens"]) == (context, tokens)
            shown = show(task, batch, number, 10)
            assert "\x00" not in shown and ("[" in shown) is not everything
            assert shown.count(EVICTED) == (
                (len(tokens) - 1) // 10 if everything else -(-len(context) // 10) + (len(tokens) - 1) // 10
            )


@pytest.mark.parametrize(
    "sleep",
    [
        SleepConfig(window=8),
        SleepConfig(window=8, passes=3),
        SleepConfig(window=8, passes=2, eviction="sliding"),
        SleepConfig(),
    ],
    ids=["one pass", "three passes", "sliding", "nothing evicted"],
)
@pytest.mark.parametrize("kind", ["texts", "questions"])
def test_a_document_reads_the_same_alone_as_among_others(kind, sleep, text_set, question_set):
    task = Text(data=(text_set if kind == "texts" else question_set,))
    model = lively(tiny("attention", "gated_delta_net", vocab_size=task.vocab_size))
    batch = draw(task, 6)
    assert batch.lengths is not None
    packed = read_batch(model, batch, sleep, return_logits=True)
    total, count = 0.0, 0
    for number in range(6):
        context, tokens, _ = batch.row(number)
        state = None
        if context:
            assert len(context) > 0
            state = sleep_forward(model, torch.tensor([context]), None, sleep, evict_last=True).state
        x = torch.tensor([tokens])
        mask = torch.ones_like(x, dtype=torch.bool)
        alone = sleep_forward(model, x, mask, sleep, state=state, read_last=False)
        assert close(packed.logits[[number], : len(tokens) - 1], alone.logits)
        total, count = total + alone.loss * (len(tokens) - 1), count + len(tokens) - 1
    assert close(packed.loss, total / count)


def test_a_prompt_of_many_windows_is_remembered_by_memory_alone(tmp_path):
    rows = [{"prompt": f"{i} " * 100, "completion": "x" * (1 + i % 2)} for i in range(40)]
    task = Text(data=(write_rows(tmp_path / "long.jsonl", rows),))
    model = lively(tiny("attention", "gated_delta_net", vocab_size=task.vocab_size))
    batch, sleep = draw(task, 4), SleepConfig(window=16, passes=2)
    out = read_batch(model, batch, sleep, return_logits=True)
    batch.context[:, 0] += 1  # a dozen windows before the answer
    changed = read_batch(model, batch, sleep, return_logits=True)
    assert batch.context.shape[1] > 12 * 16 and not close(out.logits, changed.logits, 1e-9)


def test_answers_are_scored_whole(question_set):
    task = Text(data=(question_set,))
    model = lively(tiny("attention", "gated_delta_net", vocab_size=task.vocab_size))
    score = evaluate(model, task, SleepConfig(window=8), batches=2, batch_size=5)
    assert score.total == {0: 10} and score.tokens["after_eviction"] == score.tokens["all"] > 20


# The commands


TINY = "--steps 2 --eval-batches 1 --batch-size 4 --d-model 16 --num-heads 2 --threads 1 --window 8"


def test_prompts_and_answers_are_trained_on_and_scored_by_exact_match(question_set, tmp_path, capsys):
    out = tmp_path / "run"
    code, text, err = run_command(
        capsys, "train", "text", "--data", question_set, "--out", out, *TINY.split()
    )
    assert code == 0 and "answers=0: 0." in text and "bits" not in text, err
    code, text, _ = run_command(capsys, "eval", out, "--batches", 1, "--json")
    assert code == 0 and json.loads(text)["passes"]["2"]["answers"] == {"0": 4}
    code, text, _ = run_command(capsys, "data", "text", "--data", question_set, "--samples", 1)
    assert code == 0 and "<answer> [" in text and "<end>]" in text


def test_bits_are_named_after_the_token(tmp_path, tokenizer, capsys, monkeypatch):
    (tmp_path / "book.txt").write_text("the pond has many frogs few has pond the many " * 40)
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    options = ["--data", "book.txt", "--tokenizer", "tokenizer", "--length", 16, *TINY.split()]
    code, text, err = run_command(capsys, "train", "text", *options, "--out", out)
    assert code == 0 and " bits per token (about " in text and " per byte) held out" in text, err
    monkeypatch.chdir("/")  # the run holds where its tokenizer is
    code, text, _ = run_command(capsys, "eval", out, "--batches", 1)
    assert code == 0 and " tokens)" in text and "per byte)" in text
    code, text, _ = run_command(capsys, "eval", out, "--batches", 1, "--json")
    score = json.loads(text)["passes"]["2"]
    bytes_per_token = len("the pond has many frogs few has pond the many ") / 10
    assert score["bits"] / score["bits_per_byte"] == pytest.approx(bytes_per_token, rel=0.03)


@pytest.mark.parametrize("command", ["train", "data"])
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--data", "rows.jsonl"], "rows.jsonl, line 2: not JSON"),
        (["--data", "rows.jsonl", "--fields", "body"], "rows.jsonl, line 1: no field 'body'; there are text"),
        (["--data", "empty"], "empty is no folder that datasets can load"),
        (["--data", "missing.jsonl"], "missing.jsonl is not a file"),
        (["--data", "book.txt", "--tokenizer", "empty"], "empty holds no tokenizer"),
        (["--data", "book.txt", "--tokenizer", "nowhere"], "is neither 'bytes' nor a folder"),
        (["--data", "none.jsonl"], "no document for the train split"),
    ],
)
def test_bad_input_leaves_with_2_in_one_line(command, argv, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "book.txt").write_text("word " * 1000)
    (tmp_path / "none.jsonl").write_text("\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text"\n')
    code, out, err = run_command(capsys, command, "text", *argv)
    flat = " ".join(err.replace("│", " ").split())
    assert code == 2 and said in flat and "Traceback" not in err and not out
    assert not (tmp_path / "runs").exists()
