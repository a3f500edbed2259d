import gzip
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from hf_models import VOCAB
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lmsleep.tasks import Recall, batch_rng, hide_answers
from lmsleep.tasks.base import difficulty_text
from lmsleep.tasks.recall import documents, planted
from lmsleep.tasks.recall.filler import REMARKS, SUBJECTS, TIMES, VERBS
from lmsleep.tasks.recall.planted import HELD_OUT, RELATIONS, TOLD, TRAINED_NAMES, UNSEEN_NAMES
from lmsleep.tasks.recall.task import PROSE
from lmsleep.tasks.recall.words import NAMES
from lmsleep.tasks.samples import records

ALL = ("facts", "hops", "documents", "problems", "prose")
PAGE = r"""
.TH PEEL "1"
.SH OPTIONS
.TP
\fB\-a\fR, \fB\-\-all\fR
peel every apple of the basket
.TP
\fB\-\-block\-size\fR=\fI\,SIZE\/\fR
scale sizes by SIZE before printing them;
e.g., M
.TP
.BR \-E ", " \-\-extended\-peel
use patterns that are extended.
.SH AUTHOR
Written by nobody.
"""


def draw(task, split="train", *, size=40, index=0, level=1.0):
    return task.batch(batch_rng(7, split, index), size, split, level)


def texts(task, batch):
    """The context, question and answer of each row, and the name of its kind."""
    for row, record in enumerate(records(task, batch)):
        (answer,) = record["answers"]
        asked = task.spell(record["tokens"][: answer["start"]])
        kind = task.difficulty_labels[answer["difficulty"]]
        yield int(batch.context_row[row]), record["context_text"], asked, task.spell(answer["tokens"]), kind


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer that puts a token before a text, ends it with one, and has merges within words."""
    path = tmp_path_factory.mktemp("recall") / "tokenizer"
    merges = [("Ġ", "i"), ("Ġi", "s"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("_", "_"), ("r", "e")]
    words = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in merges)]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    return str(path)


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "peel.1.gz"
    path.write_bytes(gzip.compress(PAGE.encode()))
    return path


# Answers


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("tokenizer", ["bytes", "folder"])
def test_every_answer_is_found_again_in_any_tokenizer(tokenizer, split, folder):
    name = folder if tokenizer == "folder" else "bytes"
    task = Recall(kinds=ALL, facts=(1, 6), length=2000, tokenizer=name)
    seen = Counter()
    for index in range(3):
        batch = draw(task, split, index=index)
        for row in range(len(batch.tokens)):
            hidden, expected = hide_answers(batch, row)
            assert task.solve(hidden) == expected
        seen += Counter(difficulty_text(task, key) for key in batch.difficulty.tolist())
    wanted = {f"kind={kind}" for kind in ("color", "hop", "cloze", "op1", "op4")}
    assert wanted < set(seen)
    assert any("+" in kind for kind in seen) == (split == "test")


def test_every_fact_of_a_text_is_asked_and_answers_stand_in_the_text():
    task = Recall(facts=(5, 5), filler=(3, 3))
    batch = draw(task)
    rows = list(texts(task, batch))
    assert Counter(number for number, *_ in rows) == dict.fromkeys(range(40), 5)
    for _, text, question, answer, kind in rows:
        assert question.startswith("\n") and answer[0] == " " and answer[1:] in re.findall(r"\w+", text)
        assert len(re.findall(r"\.", text)) == (13 if kind == "hop" else 8)
    assert torch.equal(batch.loss_mask, batch.answers >= 0)


def test_an_answer_is_followed_by_the_end_of_a_text_which_is_learned_and_not_scored(folder):
    batch = draw(Recall(facts=(1, 3), tokenizer=folder))
    for row in range(len(batch.tokens)):
        _, tokens, answers = batch.row(row)
        wanted = batch.loss_mask[row, : len(tokens)].tolist()
        start = wanted.index(True)
        assert tokens[-1] == 1 and answers[-1] == -1 and wanted[start:] == [True] * (len(tokens) - start)
        assert answers[start:-1] == [row] * (len(tokens) - start - 1) and set(answers[:start]) <= {-1}


def test_prose_is_a_passage_and_how_it_goes_on_without_a_question():
    task = Recall(kinds=("facts", "prose"), facts=(1, 2), filler=(0, 1), length=400)
    batch = draw(task, size=80)
    assert batch.answers.max() + 1 == len(batch.difficulty) > 30
    passages = 0
    for row in range(len(batch.tokens)):
        context, tokens, answers = batch.row(row)
        if max(answers) >= 0:
            continue
        passages += 1
        assert 200 <= len(context) <= 400 and len(tokens) == PROSE
        assert batch.loss_mask[row, :PROSE].tolist() == [False] + [True] * (PROSE - 1)
        whole = task.spell(context + tokens)
        assert any(whole in "\n\n".join(some) for some in documents._paragraphs(())["train"])
    assert passages > 20 and len(batch.parts(4)) == 4
    kinds = {answer["difficulty"] for record in records(task, batch) for answer in record["answers"]}
    assert kinds == set(batch.difficulty.tolist())


def test_paragraphs_of_the_test_are_in_no_prose_of_training(page):
    prose, asked = documents._paragraphs((page,)), documents.passages((page,))
    said = {split: {p.strip() for some in of for p in some} for split, of in prose.items()}
    assert len(said["train"]) > 1000 and len(said["test"]) > 100 and not said["train"] & said["test"]
    # However it is indented; and what is asked of in the test is not read in training either.
    words = {split: {" ".join(p.split()) for p in of} for split, of in said.items()}
    assert not words["train"] & words["test"] and not any("peel" in p for p in words["train"] | words["test"])
    tested = {unit.text for some in asked["test"] for unit in some}
    paragraphs = {text for text in tested if "\n" not in text}
    assert len(paragraphs) > 20 and paragraphs <= words["test"]
    entries = {text.split("\n", 1)[1] for text in tested - paragraphs if not text.startswith("-")}
    read = "\n".join(words["train"])
    assert len(entries) > 5 and not any(described in read for described in entries)


def test_a_text_by_hand():
    text = "Anna has a red hat. Nobody could say why. Ben's hat is blue. Carol is a friend of Ben. Max is 31."
    for question, answer in {
        "What color is Anna's hat? It is": "red",
        "What is the color of the hat of Ben? The hat is": "blue",
        "What color is the hat of Carol's friend? It is": "blue",
        "Who is Carol's friend? It is": "Ben",
        "How old is Max? Max is": "31",
    }.items():
        assert planted.solve(text, question) == answer
    for question in ("What color is Anna's coat? It is", "Is Anna there?"):
        with pytest.raises(ValueError):
            planted.solve(text, question)


def test_filler_tells_nothing():
    words = {*NAMES, *(value for relation in RELATIONS.values() for value in relation.values)}
    phrases = [f"{s} {v} {t}." for s in SUBJECTS for v in VERBS for t in TIMES[:1]]
    for sentence in [*REMARKS, *phrases]:
        assert not words & set(re.findall(r"\w+", sentence))
    assert not any(p.fullmatch(remark) for r in RELATIONS.values() for p in r.told for remark in REMARKS)


# What is held out


def told(text):
    """The relation, the place among its wordings, name and value of each fact of a text."""
    for sentence in re.findall(r"[^.]+\.", text):
        for relation in RELATIONS.values():
            for place, pattern in enumerate(relation.told):
                found = pattern.fullmatch(sentence.strip())
                if found and found["name"] in NAMES and found["value"] in relation.values:
                    yield relation, place, found["name"], found["value"]


def test_names_wordings_and_combinations_of_the_test_are_never_trained():
    task = Recall(facts=(1, 6), filler=(0, 3), length=2000)
    pairs = {"train": set(), "test": set()}
    for split, known in pairs.items():
        for index in range(6):
            for _, text, _, _, kind in texts(task, draw(task, split, index=index)):
                facts, how = list(told(text)), kind.partition("+")[2]
                assert facts
                names = {name for _, _, name, _ in facts}
                assert names <= set(UNSEEN_NAMES if how == "names" else TRAINED_NAMES)
                assert {place >= len(r.trained) for r, place, _, _ in facts} == {how == "wordings"}
                filler = text.count(".") - len(facts)
                assert 4 <= filler <= 10 if how == "filler" else filler <= 3
                if how != "names":
                    known |= {(name, value) for _, _, name, value in facts}
    assert len(pairs["train"]) > 500 < 4 * len(pairs["test"]) and not pairs["train"] & pairs["test"]
    share = len(UNSEEN_NAMES) / len(NAMES)
    assert abs(share - 1 / HELD_OUT) < 0.06 and not set(UNSEEN_NAMES) & set(TRAINED_NAMES)


def test_documents_of_the_test_are_never_trained(page):
    passages = documents.passages((page,))
    units = {split: {unit.text for some in of for unit in some} for split, of in passages.items()}
    assert len(units["train"]) > 200 and len(units["test"]) > 30 and not units["train"] & units["test"]
    task = Recall(kinds=("documents",), documents=(page,), length=4000)
    for split in units:
        for _, text, _, _, _ in texts(task, draw(task, split)):
            assert any(text.startswith(unit) for unit in units[split])
            assert not any(text.startswith(unit) for unit in units["test" if split == "train" else "train"])


# Documents


def test_options_of_a_manual_page():
    asked = [one for unit in documents.options(PAGE) for one in unit.asked]
    assert [(kind, answer) for kind, _, answer in asked] == [
        ("option", "--all"), ("option", "--block-size"), ("argument", "SIZE"), ("option", "--extended-peel"),
    ]  # fmt: skip
    assert '"peel every apple of the basket"' in asked[0][1]


def test_entries_and_marked_words_of_the_reference():
    text = (
        'String Methods\n***\n\nA *peel* is what "str.peel()" of the strings takes away.\n\n'
        "str.peel(self, skin[, knife])\n\n   Return a copy without skin.  It needs *skin*.\n\n"
        "   Changed in version 3.9: Nothing.\n\nstr.eat()\n\n   Return nothing at all.\n"
    )
    peel, eat = documents.entries(text)
    assert peel.text == "str.peel(self, skin[, knife])\nReturn a copy without skin. It needs *skin*."
    assert [answer for _, _, answer in peel.asked] == ["peel", "skin"]
    assert [answer for _, _, answer in eat.asked] == ["eat"]
    first = next(documents.paragraphs(text))
    assert [answer for _, _, answer in first.asked] == ["peel", "str.peel"]
    both = f"{peel.text}\n{eat.text}"
    for unit in (peel, eat):
        assert [documents.solutions(both, ask) for _, ask, _ in unit.asked] == [{a} for *_, a in unit.asked]
    # What two answers fit is not asked: solutions are all of them.
    twice = f"str.a()\nReturn nothing at all.\n{eat.text}"
    assert documents.solutions(twice, eat.asked[0][1]) == {"a", "eat"}


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not a file"), (b"plain words", "nothing can be asked"), (b"\x7fELF", "text")],
)
def test_documents_that_hold_no_question_are_named(tmp_path, content, message):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        draw(Recall(kinds=("documents",), documents=(path,)))


# Difficulty and floors


def test_the_level_caps_facts_filler_and_operations():
    task = Recall(kinds=("facts", "hops", "problems"), facts=(1, 8), filler=(0, 8), length=2000)
    for level, most in ((1e-9, 1), (0.25, 2), (1.0, 8)):
        rows = list(texts(task, draw(task, level=level, size=60)))
        counts = Counter(number for number, *_, kind in rows if not kind.startswith("op"))
        assert max(counts.values()) == most
        filler = [
            text.count(".") - len(list(told(text))) for _, text, *_, k in rows if not k.startswith("op")
        ]
        assert max(filler) == most
        assert max(int(kind[2:]) for *_, kind in rows if kind.startswith("op")) == max(1, most // 2)


def test_contexts_are_bounded_and_padding_is_no_part_of_them(folder):
    task = Recall(facts=(1, 8), length=300, tokenizer=folder)
    batch = draw(task)
    assert batch.context.shape[1] < 300 * 9 / 8 and batch.context_lengths.max() <= 300
    for row in range(len(batch.tokens)):
        context, tokens, answers = batch.row(row)
        assert context[0] == 0 and 0 not in tokens and answers[-2:] == [row, -1]
    with pytest.raises(ValueError, match="length=20 is too short"):
        draw(Recall(length=20))


def test_kinds_come_by_their_shares():
    task = Recall(kinds=("hops", "documents"), shares=(3, 1), facts=(2, 2))
    kinds = Counter({n: kind.partition("+")[0] for n, *_, kind in texts(task, draw(task, size=400))}.values())
    assert 260 < kinds["hop"] < 340 and kinds.total() == 400


@pytest.mark.parametrize("kinds", [("facts",), ("hops",), ("documents",)])
def test_floors_by_simulation(kinds):
    task = Recall(kinds=kinds, facts=(3, 5), filler=(0, 0), length=4000)
    floors = task.floors()
    chances, answers = {}, {}
    for index in range(8):
        by_text = {}
        for number, text, _, answer, kind in texts(task, draw(task, "test", size=60, index=index)):
            by_text.setdefault((number, text), []).append((kind, answer))
        for (_, text), asked in by_text.items():
            for kind, answer in asked:
                candidates = {a for k, a in asked if k == kind}
                if kind == "cloze":
                    candidates = {a or b for a, b in documents.MARKED.findall(text)}
                chances.setdefault(kind, []).append(1 / len(candidates))
                answers.setdefault(kind, Counter())[answer] += 1
    everything = [c for some in chances.values() for c in some]
    assert abs(floors["chance"] - sum(everything) / len(everything)) < 0.03
    for kind, some in chances.items():
        assert abs(floors[f"chance kind={kind}"] - sum(some) / len(some)) < 0.12
        best = max(answers[kind].values()) / answers[kind].total()
        assert floors[f"constant kind={kind}"] <= best + 0.02
    if kinds == ("facts",):
        assert floors["constant kind=color+filler"] == 1 / 16
    assert floors["constant"] <= max(sum(answers.values(), Counter()).values()) / len(everything) + 0.02


def test_floors_of_problems_are_those_of_gsm_infinite():
    task = Recall(kinds=("facts", "problems"))
    floors, own = task.floors(), task._problems.floors()
    assert floors["constant kind=op2"] == own["constant op=2"]
    assert floors["chance kind=color+names"] == floors["chance kind=color"] > own["chance"]


def test_words_are_enough_for_the_largest_texts():
    task = Recall(facts=(12, 12), length=4000)
    for split in ("train", "test"):
        counts = Counter(number for number, *_ in texts(task, draw(task, split, size=100)))
        assert set(counts.values()) == {12}
    assert {len(set(r.values)) == len(r.values) for r in RELATIONS.values()} == {True}
    assert len(task.difficulty_labels) == len(set(task.difficulty_labels)) and TOLD[0] == "as trained"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ()}, "kinds must be some of"),
        ({"kinds": ("facts", "facts")}, "each once"),
        ({"kinds": ("riddles",)}, "riddles"),
        ({"shares": (1.0,)}, "shares must be positive, one for each"),
        ({"shares": (1.0, 0.0)}, "shares must be positive"),
        ({"facts": (0, 3)}, "facts must be"),
        ({"facts": (3, 13)}, "facts must be"),
        ({"filler": (2, 1)}, "filler must be"),
        ({"length": 0}, "length must be"),
        ({"documents": (Path("a"),)}, "'documents' or 'prose' among kinds"),
        ({"kinds": ("prose",)}, "of prose nothing is asked; name another kind"),
    ],
)
def test_an_impossible_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        Recall(**options)


def test_the_tokenizer_and_the_documents_are_sources(folder, page):
    task = Recall(kinds=("documents",), documents=(page,), tokenizer=folder)
    names = [path.name for path in task.sources()]
    assert "peel.1.gz" in names and "tokenizer.json" in names and "topics.py" in names
    assert Recall().sources() == () and task.vocab_size <= 2 * VOCAB + 300
