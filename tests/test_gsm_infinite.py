import json
import re
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from conftest import close, lively, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lmsleep import SleepConfig
from lmsleep.tasks import GSMInfinite, batch_rng, hide_answers
from lmsleep.tasks.base import HIDDEN
from lmsleep.tasks.gsm_infinite import reader
from lmsleep.tasks.gsm_infinite.language import language, tokenizer
from lmsleep.tasks.gsm_infinite.no_chain import features
from lmsleep.tasks.gsm_infinite.task import draw_problem
from lmsleep.tasks.gsm_infinite.templates import TEMPLATES, plural
from lmsleep.tasks.gsm_infinite.thinning import LETTERS
from lmsleep.tasks.reading import read_batch

SHORT = GSMInfinite(subset="medium", ops=(2, 4), length=(0, 400))
SETTINGS = list(product(("medium", "hard"), ("forward", "reverse")))


def draw(task, size=32, split="train", index=0, level=1.0):
    return task.batch(batch_rng(0, split, index), size, split, level)


def texts(task, batch):
    # What a model reads of each sample, as text without markers.
    words = tokenizer(task.tokenizer)
    for row in range(len(batch.tokens)):
        seen, _ = hide_answers(batch, row)
        yield words.decode([t for t in seen if t != HIDDEN and t < task.pad])


def problems(subset, mode, op, number, *, split=None, modulus=None, seed=0):
    random = Random(seed)
    return [draw_problem(random, op, split, subset, mode, modulus)[0] for _ in range(number)]


def fewest(subset):
    return 2 if subset == "medium" else 1


# Answers


@pytest.mark.parametrize("question", ["first", "last"])
@pytest.mark.parametrize("modulus", [None, 23])
@pytest.mark.parametrize(("subset", "mode"), SETTINGS)
def test_the_reader_finds_every_answer_from_the_tokens_alone(subset, mode, modulus, question):
    task = GSMInfinite(
        subset=subset, mode=mode, ops=(fewest(subset), 8), length=(300, 1200), modulus=modulus,
        question=question, instruction=question == "last",
    )  # fmt: skip
    batch = draw(task, 80)
    for row in range(80):
        seen, expected = hide_answers(batch, row)
        assert seen.count(HIDDEN) == len(expected) == 1
        assert task.solve(seen) == expected
    assert set(batch.difficulty.tolist()) == set(range(fewest(subset), 9))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["words", "bytes"])
def test_every_template_is_solved_in_every_tokenizer(template, name):
    task = GSMInfinite(templates=(template,), tokenizer=name, length=(0, 6000))
    batch = draw(task, 40)
    for row in range(40):
        seen, expected = hide_answers(batch, row)
        assert task.solve(seen) == expected
    assert all(f"number of {TEMPLATES[template].attribute} per" in text for text in texts(task, batch))


@pytest.mark.parametrize("end", [None, "<end>"])
def test_a_folder_with_a_tokenizer_serves_too(tmp_path, end):
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=350, initial_alphabet=alphabet, show_progress=False)
    pairs.train_from_iterator(texts(SHORT, draw(SHORT, 20)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token=end).save_pretrained(tmp_path)
    task = replace(SHORT, tokenizer=str(tmp_path), length=(0, 1500))
    batch, words = draw(task, 20), tokenizer(str(tmp_path))
    known = words.vocab_size if end else words.vocab_size + 3
    assert task.vocab_size == known and batch.tokens.max() < known and batch.context.max() < known
    for row in range(20):
        seen, expected = hide_answers(batch, row)
        assert task.solve(seen) == expected
        context, tokens, answers = batch.row(row)
        answer = words.decode([t for t, a in zip(tokens, answers, strict=True) if a >= 0][:-1])
        said = f"\nAnswer:{answer}<end>" if end else f"ANSWER {answer.strip()} END"
        assert task.spell(tokens) == said.strip()
        assert words.encode(words.decode(context)) == context  # pieces joined are the text as a whole


@pytest.mark.parametrize(("subset", "mode"), SETTINGS)
def test_noise_never_changes_an_answer(subset, mode):
    task = GSMInfinite(subset=subset, mode=mode, ops=(fewest(subset), 8), length=(600, 1500))
    removed = 0
    for text in texts(task, draw(task, 40)):
        template = reader.read(text).template
        core = []
        for sentence in re.findall(r"[^.?]+[.?]", text):
            subject = sentence.partition(f" {template.equals} ")[0]
            noisy = any(subject.endswith(f" in {place}") for place in template.all_noise_places)
            removed += noisy
            core += [] if noisy else [sentence]
        assert reader.answer("".join(core)) == reader.answer(text)
        assert not any(
            place in "".join(core) for place in template.all_noise_places
        )  # nothing hangs on noise
    assert removed > 40 * 8


def test_a_text_without_an_answer_is_refused():
    for text, said in [
        ("How many barges are there in Tern Spit? The number of barges in Tern Spit is positive.", "would"),
        ("How many ferries are there in Gull Point?", "exactly once"),
        ("The number of ferries in Gull Point is 3.", "asks nothing"),
        ("What is the number of ferries in Gull Point? The number of ferries in Gull Point is "
         "the number of ferries in Gull Point.", "itself"),
        ("Once upon a time.", "none of the templates"),
    ]:  # fmt: skip
        with pytest.raises(reader.UnsolvableError, match=said):
            reader.answer(text)


def test_a_problem_by_hand():
    text = (
        "What is the total number of sailors in Gull Point? The number of ferries in Gull Point is 2. "
        "The number of barges in Gull Point is 1 more than the sum of the number of ferries in Gull Point "
        "and the number of sloops in Tern Spit. The average number of sailors per ferry in Gull Point is 3 "
        "times the difference between the number of barges in Gull Point and the number of ferries in Gull "
        "Point. The average number of sailors per barge in Gull Point is 4. "
        "The number of sloops in Tern Spit is 3."
    )
    assert reader.answer(text) == 2 * 3 * (6 - 2) + 6 * 4
    known = text.replace(
        "What is the total number of sailors in Gull Point?", "How many sloops are there in Tern Spit?"
    )
    known = known.replace(
        "The number of sloops in Tern Spit is 3.", "The number of sloops in Tern Spit is positive."
    )
    assert reader.answer(f"{known} The total number of sailors in Gull Point is {24 + 24}.") == 3
    assert reader.answer(text.replace("Gull Point?", "Gull Point, modulo 23?")) == 48 % 23


# Problems


def count_ops(core) -> int:
    # Operands of all that the query (or, in reverse, the given total) depends on, constants included.
    end, seen, ops = (core.given[0] if core.given else core.query), set(), 0
    todo = [end]
    while todo:
        p = todo.pop()
        if p in seen:
            continue
        seen.add(p)
        if p.thing < 0:
            below = core.structure.summands(p)
        elif p in core.definitions:
            below = list(core.definitions[p].operands)
            ops += core.definitions[p].constant is not None
        else:
            below = []
            ops += 1  # the constant that the unknown hides
        ops += len(below)
        todo += below
    return ops


@pytest.mark.parametrize(("subset", "mode"), SETTINGS)
def test_operations_can_be_recounted(subset, mode):
    for op in (fewest(subset), 2, 5, 8, 14):
        for core in problems(subset, mode, op, 12, seed=op):
            assert count_ops(core) == core.ops == op


@pytest.mark.parametrize(("subset", "mode"), SETTINGS)
def test_every_parameter_is_defined_once_and_totals_cover_what_is_mentioned(subset, mode):
    task = GSMInfinite(subset=subset, mode=mode, ops=(fewest(subset), 8), length=(300, 1200))
    for text in texts(task, draw(task, 25)):
        problem = reader.read(text)
        twice = [name for name, statements in problem.statements.items() if len(statements) > 1]
        assert len(twice) <= (mode == "reverse")  # the value that a reverse problem gives away
        assert all(len(statements) <= 2 for statements in problem.statements.values())
        for place, things in problem.mentioned.items():
            for thing in things:
                name = f"the number of {thing} in {place}"
                assert name in problem.statements or name in problem.positive
        assert len(problem.positive) == (mode == "reverse")


def test_totals_sum_every_kind_of_their_place():
    for core in problems("hard", "forward", 6, 50):
        for p in core.structure.totals:
            things = {t for k, place, t in core.structure.instances if place == p.place and k == "count"}
            assert {q.thing for q in core.structure.summands(p)} == things
            averages = [q for q in core.structure.summands(p) if q.kind == "average"]
            assert len(averages) == (len(things) if p.kind == "attributes" else 0)


@pytest.mark.parametrize("subset", ["medium", "hard"])
def test_answers_in_reverse_are_small_constants(subset):
    for op in (2, 4, 8):
        answers = {core.answer for core in problems(subset, "reverse", op, 60)}
        assert answers == {1, 2, 3, 4}
    assert {core.answer for core in problems(subset, "reverse", 4, 200, modulus=23)} > set(range(1, 20))


def test_values_stay_in_range_and_counts_are_positive():
    for op in (3, 8):
        for core in problems("hard", "forward", op, 100):
            assert (core.query.kind == "count") <= core.answer <= 1000
    assert {core.answer for core in problems("hard", "forward", 6, 400, modulus=23)} == set(range(23))


# Distributions, beside those that were measured of the original (docs/tasks.md)


def test_medium_problems_ask_mostly_for_totals():
    kinds = Counter(c.query.kind for op in range(2, 9) for c in problems("medium", "forward", op, 70))
    assert abs(kinds["total"] / kinds.total() - 0.82) < 0.05 and set(kinds) == {"total", "count"}


def variation(a, b):
    """Return half of the sum of absolute differences of two distributions, given as counts."""
    return sum(abs(a.get(x, 0) / sum(a.values()) - b.get(x, 0) / sum(b.values())) for x in {*a, *b}) / 2


@pytest.mark.parametrize("op", range(1, 9))
def test_hard_problems_are_distributed_as_in_the_original(op):
    original = json.loads((Path(__file__).parent / "golden/gsm_infinite_hard.json").read_text())["ops"][
        str(op)
    ]
    random, n, rng = Random(op), 400, np.random.default_rng(0)
    cores = [draw_problem(random, op, None, "hard", "forward", None)[0] for _ in range(n)]
    ours = {
        "answers": Counter(str(core.answer) for core in cores),
        "places": Counter(str(len(core.structure.things)) for core in cores),
        "statements": Counter(str(len(core.definitions)) for core in cores),
    }
    for name, bound in {"answers": 0.11, "places": 0.1, "statements": 0.15}.items():
        every = [value for value, count in original[name].items() for _ in range(count)]
        # What as many problems of the original would differ from all of them.
        noise = np.mean([variation(Counter(rng.choice(every, n).tolist()), original[name]) for _ in range(5)])
        assert variation(ours[name], original[name]) < noise + bound, name
    asked = Counter(core.query.kind for core in cores)
    theirs = Counter[str]()
    for order, count in original["orders"].items():
        theirs[{letter: kind for kind, letter in LETTERS.items()}[order[-1]]] += count
    assert variation(asked, theirs) < 0.12
    lengths = [int(value) * count for value, count in original["statements"].items()]
    assert abs(np.mean([len(core.definitions) for core in cores]) - sum(lengths) / 1500) < 3.5


@pytest.mark.parametrize(("subset", "constant", "copy"), [("medium", 0.46, 0.21), ("hard", 0.38, 0.21)])
def test_right_hand_sides_are_mixed_as_in_the_original(subset, constant, copy):
    cores = [c for op in range(fewest(subset), 9) for c in problems(subset, "forward", op, 60)]
    sides = [d for core in cores for d in core.definitions.values()]
    assert abs(np.mean([not d.operands for d in sides]) - constant) < 0.08
    assert abs(np.mean([len(d.operands) == 1 and d.constant is None for d in sides]) - copy) < 0.08


def test_constants_favour_what_is_not_one():
    sides = [
        d for op in (2, 5, 8) for c in problems("hard", "forward", op, 80) for d in c.definitions.values()
    ]
    alone = Counter(d.constant for d in sides if not d.operands)
    share = np.array([alone[c] for c in (1, 2, 3, 4)]) / alone.total()
    assert np.abs(share - [1 / 8, 7 / 24, 7 / 24, 7 / 24]).max() < 0.05
    assert min(d.constant for d in sides if d.times) == 2


def test_floors_are_those_of_the_original():
    floors = GSMInfinite(subset="medium", mode="forward", ops=(2, 8)).floors()
    for op, measured in zip(range(2, 9), (0.33, 0.31, 0.25, 0.13, 0.17, 0.13, 0.10), strict=True):
        assert abs(floors[f"constant op={op}"] - measured) < 0.1
    reverse = GSMInfinite(subset="medium", mode="reverse", ops=(4, 5)).floors()
    assert all(0.25 < value < 0.4 for name, value in reverse.items() if "no chain" not in name)
    assert floors["chance"] < floors["constant"] < max(floors.values())


def test_noise_may_have_numbers_as_the_problem_has():
    plain = replace(SHORT, mode="forward", length=(400, 900))
    loud = replace(plain, noise_numbers=True, modulus=23)
    digits = {}
    for task in (plain, loud):
        batch = draw(task, 40)
        said, own = [], []
        for row, text in enumerate(texts(task, batch)):
            assert task.solve([*hide_answers(batch, row)[0]]) == hide_answers(batch, row)[1]
            for statement in re.split(r"[.?] ", text)[1:]:
                noise = any(place in statement for t in TEMPLATES.values() for place in t.all_noise_places)
                (said if noise else own).append(any(c.isdigit() for c in statement))
        digits[task.noise_numbers] = np.mean(said), np.mean(own)
    assert digits[False][0] == 0 and digits[False][1] > 0.4
    assert abs(digits[True][0] - digits[True][1]) < 0.12  # a digit says nothing of where it stands


def test_the_floor_without_chaining_is_told_where_it_was_measured():
    every = GSMInfinite().floors()
    assert {f"no chain op={op}" for op in range(1, 9)} <= every.keys() and 0.2 < every["no chain"] < 0.8
    assert every["no chain op=1"] > 0.95  # the number stands in the question's own statement
    for op in range(1, 9):
        assert every[f"no chain op={op}"] > every[f"constant op={op}"] - 0.06
    one, other = (GSMInfinite(mode=mode, ops=(4, 4)).floors()["no chain"] for mode in ("forward", "reverse"))
    assert every["no chain op=4"] == pytest.approx((one + other) / 2)
    beyond = GSMInfinite(ops=(8, 9)).floors()
    assert "no chain op=8" in beyond and "no chain" not in beyond
    assert "no chain op=4" not in GSMInfinite(ops=(4, 4), modulus=7).floors()


def test_a_classifier_that_chains_nothing_reaches_the_floor_that_was_measured():
    # In little, by the nearest problem of training in the standardised features: fewer problems, so less.
    random, n = Random(1), 500
    for subset, op, at_least in (("medium", 2, 0.8), ("hard", 4, 0.35)):
        cores = [draw_problem(random, op, None, subset, "forward", None)[0] for _ in range(n)]
        x = np.array([features(core, hidden=False) for core in cores], dtype=float)
        x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)
        answers = np.array([core.answer for core in cores])
        train, test = slice(0, 400), slice(400, n)
        nearest = ((x[test, None] - x[None, train]) ** 2).sum(-1).argmin(1)
        found = (answers[train][nearest] == answers[test]).mean()
        floor = GSMInfinite(subset=subset, mode="forward", ops=(op, op)).floors()["no chain"]
        assert at_least < found < floor + 0.1
    (width,) = {len(features(core, hidden=True)) for core in cores}
    assert width < x.shape[1]


def test_operations_are_balanced_and_capped_by_the_level():
    task = replace(SHORT, ops=(2, 5), noise=False, mode="forward", length=(0, 1000))
    counts = torch.bincount(draw(task, 200).difficulty)[2:]
    assert len(counts) == 4 and (counts - 50).abs().max() < 28
    assert set(draw(task, 60, level=0.6).difficulty.tolist()) == {2, 3}
    assert set(draw(task, 20, level=0.01).difficulty.tolist()) == {2}


# Splits and streams


@pytest.mark.parametrize(("subset", "mode"), SETTINGS)
def test_the_hash_knows_all_that_the_answer_needs_and_nothing_else(subset, mode):
    random, needed, others = Random(0), 0, 0
    for _ in range(30):
        core, names = draw_problem(random, 4, None, subset, mode, None)
        number = core.hash(names)
        shuffled = random.sample(list(core.definitions.items()), len(core.definitions))
        assert replace(core, definitions=dict(shuffled)).hash(names) == number
        for p, d in core.definitions.items():
            other = d._replace(constant=(d.constant or 0) + 1)
            changed = replace(core, definitions={**core.definitions, p: other}).hash(names) != number
            assert changed == (p in core.necessary)
            needed, others = needed + changed, others + (not changed)
        for p in core.necessary:
            places = [place + "!" * (i == p.place) for i, place in enumerate(names.places)]
            assert core.hash(replace(names, places=places)) != number
        if core.given is not None:
            given = (core.given[0], core.given[1] + 1)
            assert replace(core, given=given).hash(names) != number
    assert min(needed, others) > 15


def needed(text) -> str:
    # The statements that the answer hangs on, and the question, found in the text by the reader.
    problem = reader.read(text)
    todo = [problem.asked]
    if problem.positive:  # in reverse the value that is given away: of a total, or said twice
        todo += [n for n in problem.statements if n.startswith("the total")]
        todo += [n for n, said in problem.statements.items() if len(said) == 2]
        todo += [n for n in problem.statements if n == problem.asked]
    found = {}
    for name in todo:
        said = problem.statements.get(name, [])
        below = {n for statement in said for n in statement.names}
        kind, _, place = reader._parse(problem.template, name)
        if kind in ("total", "attributes"):
            things = problem.mentioned[place]
            below |= {f"the number of {thing} in {place}" for thing in things}
            if kind == "attributes":
                one = reader._singulars(problem.template)
                per = f"the average number of {problem.template.attribute} per"
                below |= {f"{per} {one[thing]} in {place}" for thing in things}
        found[name] = sorted(
            (s.constant or 0, s.times, s.difference, s.names if s.difference else tuple(sorted(s.names)))
            for s in said
        )
        todo += [n for n in below if n not in found and n not in todo]
    return f"{problem.asked} {sorted(found.items())}"


@pytest.mark.parametrize(("subset", "mode"), SETTINGS)
def test_training_and_test_never_share_a_problem_whatever_stands_around_it(subset, mode):
    op = fewest(subset)  # where there are few problems
    task = GSMInfinite(
        subset=subset, mode=mode, ops=(op, op), templates=("harbour",), noise=False, length=(0, 1000)
    )
    train = [needed(text) for i in range(2) for text in texts(task, draw(task, 400, index=i))]
    test = {needed(text) for text in texts(task, draw(task, 150, "test"))}
    assert len(set(train[:400]) & set(train[400:])) > 10  # two draws of a split do share some
    assert len(test) > 30 and not test & set(train)


def test_both_splits_are_distributed_alike():
    for subset, mode in SETTINGS:
        kinds = {}
        for split in ("train", "test"):
            cores = problems(subset, mode, 3, 150, split=split)
            kinds[split] = Counter((core.answer > 3, core.query.kind == "count") for core in cores)
        for kind, number in (kinds["train"] | kinds["test"]).items():
            assert abs(kinds["train"][kind] - kinds["test"][kind]) < 0.15 * 150, (subset, mode, kind, number)


def test_a_batch_is_a_function_of_its_stream():
    first, again, other = draw(SHORT, 8), draw(SHORT, 8), draw(SHORT, 8, index=1)
    for name, value in vars(first).items():
        assert torch.equal(value, getattr(again, name))
    assert not torch.equal(first.context, other.context)


# Layout


@pytest.mark.parametrize("question", ["first", "last"])
def test_contexts_have_the_length_that_was_asked_for(question):
    task = GSMInfinite(question=question)
    batch = draw(task, 48)
    assert batch.context.shape[1] == 3300
    assert batch.context_lengths.min() >= 2000 and batch.context_lengths.max() <= 3300
    assert batch.context_lengths.float().std() > 200  # all over the range, not at its ends
    for row, length in zip(batch.context, batch.context_lengths, strict=True):
        assert (row[:length] < task.pad).all() and (row[length:] == task.pad).all()


def test_without_noise_the_core_stays_alone():
    task = GSMInfinite(noise=False, length=(0, 3300))
    for text in texts(task, draw(task, 30)):
        assert not any(place in text for t in TEMPLATES.values() for place in t.all_noise_places)


@pytest.mark.parametrize("question", ["first", "last"])
def test_masks_cover_exactly_the_answers(question):
    task = replace(SHORT, question=question, mode="forward")
    batch = draw(task, 60)
    words, marker = tokenizer("words"), task.pad + 1
    for row in range(60):
        _, tokens, answers = batch.row(row)
        at = tokens.index(marker)
        assert answers == [-1] * (at + 1) + [row] * (len(tokens) - at - 1)
        assert batch.loss_mask[row].tolist() == (batch.answers[row] >= 0).tolist()
        assert tokens[-1] == task.pad + 2 and words.decode(tokens[at + 1 : -1]).isdigit()
        assert (at > 0) == (question == "last") and ("?" in words.decode(tokens[:at])) == (question == "last")
    assert not batch.loss_mask[:, 0].any()


def test_padding_is_neither_read_nor_slept_on():
    task = replace(SHORT, length=(0, 150))
    batch, sleep = draw(task, 3), SleepConfig(window=32, passes=2)
    model = lively(tiny(vocab_size=task.vocab_size))
    together = read_batch(model, batch, sleep, return_logits=True).logits
    assert len(batch.context_lengths.unique()) > 1
    for row, length in enumerate(batch.context_lengths):
        alone = replace(
            batch, context=batch.context[row : row + 1, :length], context_row=torch.tensor([0]),
            context_lengths=None, tokens=batch.tokens[row : row + 1], answers=batch.answers[row : row + 1],
            loss_mask=batch.loss_mask[row : row + 1], lengths=batch.lengths[row : row + 1],
        )  # fmt: skip
        expected = read_batch(model, alone, sleep, return_logits=True).logits
        read = batch.lengths[row] - 1
        assert close(together[row : row + 1, :read], expected[:, :read], 1e-9)


def test_numbers_of_things_agree_with_their_names():
    assert [plural(w) for w in ("ferry", "launch", "thesis", "gondola", "essay", "cypress")] == [
        "ferries", "launches", "theses", "gondolas", "essays", "cypresses",
    ]  # fmt: skip
    task = GSMInfinite(length=(800, 1500))
    for text in texts(task, draw(task, 20)):
        for thing in re.findall(r"average number of \w+ per ([\w ]+?) in ", text):
            assert any(thing == one for t in TEMPLATES.values() for one, _ in _all_things(t))
        for thing in re.findall(r"(?<!total )(?<!average )number of ([\w ]+?) in ", text):
            assert any(thing == many for t in TEMPLATES.values() for _, many in _all_things(t))


def _all_things(template):
    return [thing for group in (*template.things, *template.all_noise_things) for thing in group]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_names_of_noise_are_none_of_the_problem(template):
    places = {place for group in template.places for place in group}
    things = {thing for group in template.things for thing in group}
    assert len(places) == len(things) == 10
    assert not places & set(template.all_noise_places) and len(set(template.all_noise_places)) == 640
    noise = [thing for group in template.all_noise_things for thing in group]
    assert not things & set(noise) and len(set(noise)) == 640


def test_spelling_names_the_markers():
    language("harbour", "words")
    words = tokenizer("words")
    assert SHORT.spell(
        [*words.encode("The number"), SHORT.pad + 1, *words.encode("12"), SHORT.pad + 2, SHORT.pad]
    ) == ("The number ANSWER 12 END PAD")


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subset": "medium"}, r"^ops=\(1, 8\): no medium problem has one operation"),
        ({"ops": (0, 3)}, r"^ops must be 1 <= fewest <= most <= 20, got \(0, 3\)"),
        ({"ops": (3, 21)}, r"^ops must be"),
        ({"ops": (5, 4)}, r"^ops must be"),
        ({"subset": "easy"}, r"^subset must be one of 'medium', 'hard', got 'easy'"),
        ({"mode": "sideways"}, r"^mode must be one of"),
        ({"question": "never"}, r"^question must be one of"),
        ({"templates": ("harbour", "zoo")}, r"^templates must be some of harbour, library, orchard"),
        ({"templates": ()}, r"^templates must be some of"),
        ({"modulus": 1}, r"^modulus must lie in 3"),
        ({"length": (50, 40)}, r"^length must be 0 <= fewest <= most"),
        ({"length": (2000, 2010)}, r"^length=\(2000, 2010\) leaves too little room"),
        ({"tokenizer": "nowhere"}, r"^tokenizer='.*nowhere' is neither"),
    ],
)
def test_an_impossible_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        GSMInfinite(**options)


def test_a_length_that_holds_no_problem_is_named(monkeypatch):
    monkeypatch.setattr("lmsleep.tasks.gsm_infinite.task.MISFITS", 20)
    task = GSMInfinite(noise=False, length=(0, 20))
    with pytest.raises(
        ValueError, match=r"^length=\(0, 20\) is too short: of 20 problems of op=\d none fits"
    ):
        draw(task, 2)
