import gc
import json
import os
import socket
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lively, random_tokens, run_command, same_memory, tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lmsleep import (
    Consolidator,
    GradientSteps,
    Memory,
    Origin,
    Passes,
    Session,
    SleepConfig,
    State,
    adapt,
    fingerprint,
    shipped,
    sleep_forward,
)
from lmsleep.files import write_atomic
from lmsleep.memory import file, identity, model_identity
from lmsleep.memory.saved import pack, unpack
from lmsleep.training import RunFolder

L = 5


@pytest.fixture(scope="module")
def model():
    return lively(tiny("attention", "gated_delta_net", "gated_linear"))


@pytest.fixture
def session(model):
    session = Session(model, SleepConfig(window=L, passes=2, eviction="sliding"))
    session.read(random_tokens(2 * L + 3))
    return session


@pytest.mark.parametrize("eviction", ["hard", "sliding"])
@pytest.mark.parametrize("cut", [0, 3, L, 2 * L + 2])
def test_a_session_goes_on_from_its_file_exactly(model, tmp_path, eviction, cut):
    x, path = random_tokens(4 * L), tmp_path / "a.mem"
    whole = Session(model, SleepConfig(window=L, passes=2, eviction=eviction))
    whole.read(x[:cut])
    whole.save(path)
    again = Session.load(path, model)
    assert again.sleep_config == whole.sleep_config and again.memory.origin == whole.memory.origin
    for session in (whole, again):
        session.read(x[cut:])
    assert same_memory(again.stream.start.memory, whole.stream.start.memory, 0.0)
    assert same_memory(again.memory, whole.memory)
    assert (again.stats.tokens, again.stats.sleeps) == (whole.stats.tokens, whole.stats.sleeps)
    assert again.generate([1], 4) == whole.generate([1], 4)


def test_a_memory_comes_back_as_it_was(model, session, tmp_path):
    session.sleep()
    session.memory.save(tmp_path / "a.mem", tags={"about": "nothing"})
    loaded = Memory.load(tmp_path / "a.mem", model)
    assert same_memory(loaded, session.memory, 0.0)
    assert loaded.origin.tags == {"about": "nothing"} and loaded.origin.id == session.memory.origin.id
    assert (loaded.origin.tokens, loaded.origin.sleeps, loaded.origin.passes) == (2 * L + 3, 3, 2)
    assert same_memory(Memory.load(tmp_path / "a.mem"), loaded, 0.0)  # to look at, without a model
    assert Session.load(tmp_path / "a.mem", model, sleep=session.sleep_config).stats.sleeps == 3
    with pytest.raises(ValueError, match="a memory alone"):
        Session.load(tmp_path / "a.mem", model)


def test_the_memory_of_any_reading_can_be_saved_with_its_model(model, tmp_path):
    memory = sleep_forward(model, random_tokens(2, 9), None, SleepConfig(window=L)).memory
    with pytest.raises(ValueError, match="pass model="):
        memory.save(tmp_path / "a.mem")
    memory.save(tmp_path / "a.mem", model)
    assert same_memory(Memory.load(tmp_path / "a.mem", model), memory, 0.0)
    with pytest.raises(ValueError, match="2 rows"):
        Session.load(tmp_path / "a.mem", model, sleep=SleepConfig())


def test_the_file_is_plain_safetensors(model, session, tmp_path):
    session.save(tmp_path / "a.mem")
    tensors = load_file(tmp_path / "a.mem")
    assert torch.equal(tensors["S.1"], session.stream.start.memory.layers[1])
    assert torch.equal(tensors["window"], session.stream.window)
    with safe_open(tmp_path / "a.mem", "pt") as file:
        meta = file.metadata()
    assert (meta["format"], meta["version"]) == ("lmsleep-memory", "1")
    assert json.loads(meta["model"]) == fingerprint(model) and json.loads(meta["blocks"]) == 3
    assert json.loads(meta["sleep"])["window"] == L


@pytest.mark.parametrize(("storage", "error"), [("float32", 1e-7), ("bfloat16", 2**-8), ("int8", 1 / 254)])
def test_storage_rounds_as_its_dtype_does(session, storage, error):
    packed = pack(session.memory, storage)
    back = Memory(unpack(packed, len(session.memory.layers)))
    for S, R in zip(session.memory.layers, back.layers, strict=True):
        if S is not None:
            scale = S.abs().amax((-1, -2), keepdim=True)
            assert ((S - R).abs() <= error * scale * (1 + 1e-5)).all()
            assert storage == "float32" or (S - R).abs().max() > 0
    assert packed["S.1"].dtype == getattr(torch, storage)


def test_zero_fast_weights_survive_int8(model, tmp_path):
    Session(model, SleepConfig(window=L)).save(tmp_path / "a.mem", storage="int8")
    assert Memory.load(tmp_path / "a.mem", model).norms().sum() == 0


def test_an_unknown_storage_is_named(session, tmp_path):
    with pytest.raises(ValueError, match="storage must be one of"):
        session.save(tmp_path / "a.mem", storage="float8")
    assert not list(tmp_path.iterdir())


HANDED_ON = {
    "map": lambda m: m.map(torch.neg),
    "clone": Memory.clone,
    "detach": Memory.detach,
    "to": lambda m: m.to(dtype=torch.float64),
    "rows": lambda m: m[[0, 0]],
    "like": lambda m: m.like(m),
}


@pytest.fixture(scope="module", params=["HybridLM", "transformers"])
def written(request, tmp_path_factory):
    # A model, how it sleeps, and the session's memory out of a file.
    if request.param == "HybridLM":
        model, rule = lively(tiny("attention", "gated_delta_net")), (None, "gated_delta_net")
    else:
        family = pytest.importorskip("hf_models").family
        model, rule = adapt(family("qwen3_5")), ("fast_weights", None) * 2
    session = Session(model, SleepConfig(window=L, passes=2))
    session.read(random_tokens(2 * L + 3))
    path = tmp_path_factory.mktemp("origins") / "a.mem"
    session.memory.save(path, tags={"about": "nothing"})
    loaded = Memory.load(path, model)
    assert loaded.origin == replace(session.memory.origin, tags={"about": "nothing"})
    assert loaded.origin.rule == rule and loaded.origin.model == fingerprint(model)
    return model, session.sleep_config, loaded


@pytest.mark.parametrize("how", HANDED_ON)
def test_who_wrote_a_memory_travels_with_it(written, tmp_path, how):
    model, sleep, loaded = written
    copy = HANDED_ON[how](loaded)
    assert copy.origin == loaded.origin
    copy.save(tmp_path / "b.mem")  # knows its model
    assert Memory.load(tmp_path / "b.mem").origin == loaded.origin
    assert Session(model, sleep, memory=copy[[0]]).stats.tokens == loaded.origin.tokens > 0


def test_who_wrote_a_memory_survives_a_fork_and_a_merge(written, tmp_path):
    model, sleep, loaded = written
    child = loaded[[0, 0]].to(dtype=torch.float64).fork()[[1]]
    assert child.origin == replace(loaded.origin, id=child.origin.id, parents=(loaded.origin.id,))
    session = Session(model, sleep, memory=child)
    session.read(random_tokens(L + 1))
    grown = session.memory.clone()
    assert (
        grown.origin.tokens == loaded.origin.tokens + L + 1 and grown.origin.parents == child.origin.parents
    )
    merged = loaded.merge([grown]).clone()
    assert merged.origin.parents == (loaded.origin.id, child.origin.id)
    assert merged.origin.tokens == loaded.origin.tokens + grown.origin.tokens
    merged.save(tmp_path / "m.mem")
    again = Memory.load(tmp_path / "m.mem", model)
    assert again.origin == merged.origin
    assert again.origin.rule == loaded.origin.rule
    assert Session(model, sleep, memory=again).stats.sleeps == loaded.origin.sleeps + grown.origin.sleeps


def test_a_method_is_handed_on_and_is_unknown_of_old_files(model, session, tmp_path):
    session.sleep()
    memory, other = session.memory, SleepConfig(window=L, consolidator=Own(2))
    assert memory.fork().merge([memory]).origin.method == memory.clone().origin.method == "passes"
    unknown = replace(memory, origin=replace(memory.origin, method=None))
    assert memory.merge([unknown]).origin.method == unknown.merge([memory]).origin.method == "passes"
    with pytest.raises(ValueError, match=r"^memory was written by passes, and would be slept on by Own"):
        Session(model, other, memory=memory)
    theirs = replace(memory, origin=replace(memory.origin, method="Own"))
    with pytest.raises(ValueError, match=r"^memories that Own and passes wrote cannot be merged"):
        memory.merge([unknown, theirs])
    # What no sleep has written is any method's, and so is what does not say it.
    for free in (Session(model, session.sleep_config).memory, unknown):
        assert Session(model, other, memory=free).memory.origin.method == "Own"
    old = Memory.load(Path(__file__).parent / "golden" / "depo-N4-S.mem")
    assert old.origin.method is None and old.origin.sleeps > 0
    with pytest.raises(
        ValueError, match="id, parents, model, method and rule of a memory must be text, got 1"
    ):
        replace(old.origin, method=1)


def test_what_was_read_on_is_no_copy(model, session):
    state = State(session.memory, model.initial_state(1).cache)
    assert state.memory.origin is not None
    assert sleep_forward(model, random_tokens(1, 3), None, SleepConfig(), state=state).memory.origin is None


def test_a_model_without_weights_has_no_identity():
    assert model_identity(object()) is None
    layer = torch.nn.Linear(2, 2)
    assert model_identity(layer) == fingerprint(layer)
    before = fingerprint(layer)
    layer.weight.data.add_(1)  # not counted by PyTorch, so not seen, as documented
    assert fingerprint(layer) == before
    layer.weight.data = layer.weight.data.clone()  # but another tensor is
    assert fingerprint(layer) != before


def test_a_model_is_hashed_once(tmp_path, monkeypatch):
    hashed, digest = [], identity._digest_of
    monkeypatch.setattr(identity, "_digest_of", lambda *x: hashed.append(1) or digest(*x))
    model = lively(tiny("attention", "gated_delta_net"), seed=3)
    session = Session(model, SleepConfig(window=L, passes=2))
    session.read(random_tokens(L + 2))
    session.save(tmp_path / "a.mem")
    for _ in range(3):
        fork = Session.load(tmp_path / "a.mem", model).fork()
        fork.generate([1], 2)
        fork.save(tmp_path / "b.mem")
    assert len(hashed) == 1
    with torch.no_grad():
        model.embedding.weight[0, 0] += 1
    with pytest.raises(ValueError, match="another model"):
        Memory.load(tmp_path / "a.mem", model)
    model.float()
    assert fingerprint(model) != fingerprint(model.double()) and len(hashed) > 2


# What does not fit


def rewritten(path, **meta):
    # The file with other metadata, under the name of its own checksum.
    with safe_open(path, "pt") as file:
        save_file(load_file(path), path, {**file.metadata(), **meta})


def edited(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


CHANGES = {
    "is empty": lambda p: p.write_bytes(b""),
    "is cut short": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "is cut short, or not": lambda p: p.write_bytes(p.read_bytes()[:100]),
    "edited or damaged": edited,
    "edited or damaged: ": lambda p: rewritten(p, tokens="1"),
    "has format version '2'; this lmsleep reads 1": lambda p: rewritten(p, version="2"),
    "is not a memory file": lambda p: p.write_text("Once upon a time there was a text."),
    "is not a memory file ": lambda p: save_file({"S.1": torch.zeros(1)}, p),
    "is not a memory file of": lambda p: save_file({"S.1": torch.zeros(1)}, p, {"format": "pt"}),
}


@pytest.mark.parametrize("said", CHANGES)
@pytest.mark.parametrize("load", [Memory.load, Session.load])
def test_a_file_that_is_no_memory_is_called_what_it_is(model, session, tmp_path, said, load):
    path = tmp_path / "a.mem"
    session.save(path)
    CHANGES[said](path)
    with pytest.raises(ValueError, match=f"a.mem .*{said.strip(': ')}"):
        load(path, model)


def test_a_memory_of_another_model_is_refused(model, session, tmp_path):
    session.save(tmp_path / "a.mem")
    same = lively(tiny("attention", "gated_delta_net", "gated_linear"))
    assert fingerprint(same) == fingerprint(model)
    Memory.load(tmp_path / "a.mem", same)
    with torch.no_grad():
        next(same.parameters()).flatten()[0] += 1e-9
    for other in (same, lively(tiny("attention", "gated_delta_net", "gated_linear", rope_theta=99.0))):
        with pytest.raises(ValueError, match="another model"):
            Memory.load(tmp_path / "a.mem", other)


def test_an_option_that_a_later_version_adds_keeps_old_memories(model, tmp_path):
    from dataclasses import make_dataclass

    Later = make_dataclass("Later", [("new", int, 3)], bases=(type(model.config),), frozen=True, kw_only=True)
    same = lively(tiny("attention", "gated_delta_net", "gated_linear"))
    for new, equal in ((3, True), (4, False)):
        same.config = Later(**vars(model.config), new=new)
        assert (fingerprint(same) == fingerprint(model)) == equal


def test_a_plain_configuration_counts_by_what_it_says():
    class Plain:
        def __init__(self, size):
            self.size, self.kind, self.dtype = size, Plain, torch.float32

    def built(size, inner):
        found = torch.nn.Linear(2, 2)
        torch.nn.init.zeros_(found.weight), torch.nn.init.zeros_(found.bias)
        found.config = Plain(size)
        found.config.inner = Plain(inner)
        return found

    assert fingerprint(built(1, 2)) == fingerprint(built(1, 2))
    assert len({fingerprint(built(*sizes)) for sizes in ((1, 2), (1, 3), (2, 2))}) == 3


def test_the_fingerprint_of_a_shipped_model_stays():
    model = RunFolder(shipped.find(Path("depo-N4"))).model()
    assert fingerprint(model).startswith("15dfff90d0cd18df")  # docs/microscope.md


def test_a_missing_file_is_an_os_error(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        Session.load(tmp_path / "none.mem", model)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    session = Session(model, SleepConfig(window=L, passes=2, eviction="sliding"))
    session.read(random_tokens(2 * L + 3))
    path = tmp_path_factory.mktemp("fuzz") / "a.mem"
    session.save(path)
    return path, path.read_bytes(), session


@given(
    cut=st.one_of(st.none(), st.integers(0, 4000)),
    flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=4),
    inserted=st.binary(max_size=8),
    at=st.integers(0, 2500),
)
def test_a_mutated_file_is_refused_or_says_the_same(model, saved, cut, flips, inserted, at):
    path, data, session = saved
    mutated = bytearray(data[:at] + inserted + data[at:])[:cut]
    for place, value in flips:
        if place < len(mutated):
            mutated[place] = value
    other = path.parent / "mutated.mem"
    other.write_bytes(bytes(mutated))
    for load in (lambda: Memory.load(other, model), lambda: Session.load(other, model).stream.start.memory):
        try:
            loaded = load()
        except ValueError as error:
            assert str(other) in str(error)
        else:
            assert same_memory(loaded, session.stream.start.memory, 0.0)


def nested(x):
    return st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x)


@given(header=st.recursive(st.none() | st.integers() | st.text(max_size=5), nested, max_leaves=8))
def test_any_json_where_the_index_should_be_is_refused(model, saved, header):
    index = json.dumps(header).encode()
    other = saved[0].parent / "json.mem"
    other.write_bytes(struct.pack("<Q", len(index)) + index)
    with pytest.raises(ValueError, match=r"json\.mem"):
        Memory.load(other, model)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({}, "lacks a field"),
        ({**asdict(Origin()), "blocks": "x"}, "is no memory"),
        ({**asdict(Origin(model="m")), "tokens": "many", "blocks": 3}, "must be a count"),
        ({**asdict(Origin()), "blocks": 3}, "another model"),
    ],
)
def test_a_header_with_a_checksum_of_its_own_is_still_checked(model, tmp_path, header, said):
    file.write(tmp_path / "a.mem", {"S.1": torch.zeros(1, 2, 3, 4)}, header)
    with pytest.raises(ValueError, match=said):
        Memory.load(tmp_path / "a.mem", model)


@pytest.mark.parametrize("load", [Memory.load, Session.load])
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("blocks", -1, "blocks must lie in"),
        ("blocks", 10**12, "blocks must lie in"),
        ("blocks", 3.0, "blocks must lie in"),
        ("blocks", True, "blocks must lie in"),
        ("tokens", -1, "must be a count, got -1"),
        ("tokens", True, "must be a count"),
        ("sleeps", -2, "must be a count, got -2"),
        ("sleeps", 1.5, "must be a count"),
        ("passes", 2.5, "must be a count"),
        ("tags", ["a"], "tags must map texts"),
        ("tags", "a", "tags must map texts"),
        ("tags", {"a": "\ud800"}, "tags must map texts"),
        ("model", ["m"], "must be text"),
        ("rule", [1], "must be text"),
        ("parents", [None], "must be text"),
    ],
)
def test_headers_that_no_session_has_are_refused(model, saved, load, key, value, said):
    other = saved[0].parent / "counts.mem"
    tensors, header = file.read(saved[0])
    del header["time"]
    file.write(other, tensors, {**header, key: value})
    with pytest.raises(ValueError, match=said):
        load(other, model)


@pytest.mark.parametrize(
    "change",
    [{"window": True}, {"window": 10**30}, {"eviction": ["hard"]}, {"nosuch": 1}, {"consolidator": {}},
     {"eviction": {"name": "hard", "more": 1}}, {"consolidator": {"name": "nosuch"}},
     {"consolidator": {"name": 3}},
     *({"consolidator": {"name": "passes", **options}}
       for options in ({"passes": 2.5}, {"passes": 10**12}, {"loop": [0.0, 1.0]}, {"loop": [1]}, {"loop": []},
                       {"normalize": "no"}, {"normalize": 1}))],
    ids=str,
)  # fmt: skip
def test_a_sleep_with_options_of_another_type_is_refused(model, saved, change):
    tensors, header = file.read(saved[0])
    other, sleep = saved[0].parent / "sleep.mem", header["sleep"]
    del header["time"]
    file.write(other, tensors, {**header, "sleep": {"window": 4, "loop": [1, 2], "inner_rate": None}})
    Session.load(other, model)
    file.write(other, tensors, {**header, "sleep": {**sleep, **change}})
    with pytest.raises(ValueError, match="holds no session"):
        Session.load(other, model)


@pytest.mark.parametrize(
    "second", [torch.ones(2, 2, 3, 4), torch.ones(0, 2, 3, 4), torch.ones(1, 2, 3, 4) * 1j]
)
def test_tensors_that_are_no_fast_weights_are_refused(second):
    first = torch.ones(1, 2, 3, 4)
    assert len(unpack({"S.0": first, "S.1": first}, 2)) == 2
    with pytest.raises(ValueError, match="fast weights"):
        unpack({"S.0": first, "S.1": second}, 2)


def test_a_scale_of_another_shape_is_refused(session):
    packed = pack(session.memory, "int8")
    for shape in ((1,), (1, 1, 1, 1, 1), (1, packed["S.1"].shape[1], 1, 3)):
        with pytest.raises(ValueError, match=r"S\.1\.scale has shape"):
            unpack({**packed, "S.1.scale": torch.ones(shape)}, 3)


def test_no_pickle_is_near(saved):
    import ast
    import inspect

    from lmsleep.memory import saved as memory_saved
    from lmsleep.session import saving

    for module in (file, memory_saved, saving):
        source = inspect.getsource(module)
        names = {n.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name)}
        assert "pickle" not in source and "torch.load" not in source and "eval" not in names


# Writing


def test_a_failed_write_leaves_the_old_file(session, tmp_path, monkeypatch):
    path = tmp_path / "a.mem"
    session.save(path)
    before = path.read_bytes()
    session.read([1, 2, 3])

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lmsleep.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        session.save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.mem"]


def test_nan_is_not_written(model, tmp_path):
    memory = sleep_forward(model, random_tokens(1, 9), None, SleepConfig(window=L)).memory
    with pytest.raises(ValueError, match="NaN or infinity"):
        memory.map(lambda s: s * float("nan")).save(tmp_path / "a.mem", model)
    assert not list(tmp_path.iterdir())


def test_log_walks_the_parents_in_the_folder(model, session, tmp_path):
    (tmp_path / "notes.txt").write_text("no memory")
    child = session.fork()
    child.read([1, 2])
    session.sleep(), child.sleep()
    session.memory.save(tmp_path / "base.mem")
    child.memory.save(tmp_path / "child.mem")
    merged = session.memory.merge([child.memory])
    merged.save(tmp_path / "merged.mem")
    names = [where and where.name for where, _ in Memory.log(tmp_path / "merged.mem")]
    assert names == ["merged.mem", "base.mem", "child.mem"]
    (tmp_path / "base.mem").unlink()
    found = Memory.log(tmp_path / "child.mem")
    assert [where and where.name for where, _ in found] == ["child.mem", None]
    assert found[1][1].id == session.memory.origin.id


def test_log_passes_over_what_a_killed_write_left(session, tmp_path):
    child = session.fork()
    session.save(tmp_path / ".base.mem.123")
    child.save(tmp_path / "child.mem")
    assert [where and where.name for where, _ in Memory.log(tmp_path / "child.mem")] == ["child.mem", None]


def test_threads_may_save_one_path(session, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(write_atomic, tmp_path / "a", bytes([i]) * 100_000) for i in range(40)]:
            done.result()
    data = (tmp_path / "a").read_bytes()
    assert len(data) == 100_000 and len(set(data)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@dataclass(frozen=True)
class Own(Consolidator):
    """A consolidator with an option that may be anything."""

    extra: Any = None

    def sleep_on(self, model, window, *, logits=True):
        return self.read(model, window, logits=logits)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("\ud800")
    | st.builds(object),
    lambda x: st.lists(x, max_size=2) | st.tuples(x) | st.dictionaries(st.text() | st.integers(), x),
    max_leaves=4,
)  # fmt: skip


@given(
    tags=st.dictionaries(st.text(max_size=3), st.text(max_size=3) | ANYTHING, max_size=2),
    extra=ANYTHING,
    scale=st.sampled_from([1.0, 0.0, 1e-300, 1e39, 1e300, float("inf")]),
    storage=st.sampled_from([None, "float32", "bfloat16", "int8", "float8", 1]),
)
def test_what_save_accepts_load_accepts_and_what_it_refuses_changes_nothing(
    model, tmp_path_factory, tags, extra, scale, storage
):
    path = tmp_path_factory.mktemp("kept") / "a.mem"
    kept = Session(model, SleepConfig(window=L, passes=2))
    kept.save(path)
    before, memory = path.read_bytes(), kept.memory.map(lambda S: torch.ones_like(S) * scale)
    session = Session(model, SleepConfig(window=L, consolidator=Own(2, extra)), memory=memory)
    origin = session.origin
    try:
        session.save(path, tags=tags, storage=storage)
    except ValueError:
        assert path.read_bytes() == before and session.origin is origin
        assert [p.name for p in path.parent.iterdir()] == ["a.mem"]
    else:
        again = Session.load(path, model, sleep=session.sleep_config)
        assert again.origin.tags == session.origin.tags == tags


TENSORS = st.builds(
    lambda shape, dtype, scale: (torch.ones(shape) * scale).to(dtype),
    st.lists(st.integers(0, 2), max_size=4),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8,
                     torch.bool, torch.complex64, torch.uint16]),
    st.sampled_from([0.0, 1.0, 100.0]),
)  # fmt: skip


@given(layers=st.lists(st.none() | TENSORS | st.tuples(TENSORS, TENSORS), max_size=3), data=st.data())
def test_a_memory_that_is_saved_is_one_that_loads(tmp_path_factory, layers, data):
    path = tmp_path_factory.mktemp("memories") / "a.mem"
    memory = Memory(tuple(layers), Origin(model="m"))
    try:
        memory.save(path, storage=data.draw(st.sampled_from([None, "float32", "bfloat16", "int8"])))
    except ValueError:
        assert not path.exists()
    else:
        again = Memory.load(path)
        assert [t.shape for t in again.tensors()] == [t.shape for t in memory.tensors()]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SleepConfig, {"window": True}), (SleepConfig, {"window": 2.0}), (SleepConfig, {"window": 10**30}),
        (SleepConfig, {"sleep_on_loss": 0}), (SleepConfig, {"normalize": 1}), (SleepConfig, {"passes": True}),
        (Passes, {"passes": "2"}), (Passes, {"passes": 10**12}), (Passes, {"loop": []}),
        (Passes, {"loop": (0, 1.5)}), (Passes, {"loop": "center"}), (Passes, {"reset": 1}),
        (Passes, {"normalize": None}), (Passes, {"reinject": 1}), (Passes, {"wake_passes": 1.0}),
        (GradientSteps, {"rate": True}), (GradientSteps, {"rate": "1"}),
        (GradientSteps, {"rate": float("inf")}), (GradientSteps, {"rate": float("nan")}),
        (Origin, {"tags": {"a": 1}}), (Origin, {"tokens": True}), (Origin, {"parents": "ab"}),
        (Origin, {"rule": (1,)}), (Origin, {"id": None}),
    ],
    ids=str,
)  # fmt: skip
def test_values_of_another_type_are_refused_where_they_are_given(kind, options):
    [name] = options
    with pytest.raises(ValueError, match=name):
        kind(**options)


# Reading what is there, and no more


def special(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 2**40)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as its:
            its.bind(str(path))
    else:
        path.symlink_to(f"/dev/{kind}")


@pytest.mark.parametrize("kind", ["pipe", "sparse", "folder", "socket", "zero", "null"])
def test_what_is_no_file_is_refused_unread(model, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)  # names of sockets must be short
    special(Path("a.mem"), kind)
    for load in (Memory.load, Memory.log, lambda path: Session.load(path, model)):
        with pytest.raises((ValueError, OSError), match=r"a\.mem"):
            load("a.mem")


def test_a_file_that_goes_on_behind_its_end_is_refused_unread(saved):
    path = saved[0].parent / "longer.mem"
    path.write_bytes(saved[1])
    os.truncate(path, 2**40)
    with pytest.raises(ValueError, match="edited or damaged: it has more than it says"):
        Memory.load(path)


def peak(call):
    # Bytes of main memory that a call takes beyond what is there, at the most.
    def held(name):
        [line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name)]
        return int(line.split()[1]) * 1024

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = held("VmRSS")
    result = call()
    return held("VmHWM") - before, result


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("storage", [None, "bfloat16", "int8"])
def test_saving_and_loading_take_no_more_than_the_memory(tmp_path, storage):
    memory = Memory((torch.randn(1, 4, 1024, 2048), torch.randn(1, 4, 1024, 2048)), Origin(model="m"))
    size, slack = memory.nbytes, 8 << 20  # 64 MiB
    taken, _ = peak(lambda: memory.save(tmp_path / "a.mem", storage=storage))
    assert taken < (0.2 if storage is None else 1.8) * size + slack  # of the packed tensors and their check
    taken, loaded = peak(lambda: Memory.load(tmp_path / "a.mem"))
    assert taken < (1.2 if storage is None else 2.2) * size + slack and loaded.nbytes == size


# Files whose checksum is right, though no session wrote them


def crafted(saved, tensors=(), **header):
    path = saved[0].parent / "crafted.mem"
    there, said = file.read(saved[0])
    del said["time"]
    file.write(path, {**there, **dict(tensors)}, {**said, **header})
    return path


@pytest.mark.parametrize("empty_window", [False, True])
@pytest.mark.parametrize("name", ["cache.0.0", "cache.0.1"])
@pytest.mark.parametrize("change", [lambda t: t[:, :1], lambda t: torch.cat([t, t], 1)])
def test_a_working_memory_that_does_not_fit_together_is_refused(model, saved, name, change, empty_window):
    tensors = {name: change(file.read(saved[0])[0][name])}
    if empty_window:
        tensors["window"] = torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"crafted\.mem: its working memory does not fit together"):
        Session.load(crafted(saved, tensors), model)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"window": torch.tensor(3)}, "open window is no row of tokens"),
        ({"window": torch.ones(2, 2, dtype=torch.int64)}, "open window is no row of tokens"),
        ({"window": torch.ones(2)}, "open window is no row of tokens"),
        ({"cache.0.0": torch.full((1, 4, 2, 8), 1e300, dtype=torch.float64)}, "holds NaN or infinity"),
        ({"cache.7.0": torch.ones(1, 4, 2, 8)}, "belongs to no block"),
        ({"S.1": torch.full((1, 2, 8, 8), 1e300, dtype=torch.float64)}, "too large for the model's dtype"),
    ],
)
def test_tensors_that_no_session_has_are_refused(saved, tensors, said, capsys):
    model = lively(tiny("attention", "gated_delta_net", "gated_linear"), dtype=torch.float32)
    path = crafted(saved, tensors, model=fingerprint(model))
    with pytest.raises(ValueError, match=said):
        Session.load(path, model)
    if "window" in tensors:
        for argv in (["show", path], ["merge", path, path, "--out", path.parent / "merged.mem"]):
            code, _, err = run_command(capsys, "memory", *argv)
            assert code == 2 and said in err and err.count("\n") == 1


@pytest.mark.parametrize("tensor", [torch.tensor([[[float("nan")]]]), torch.ones(1, 4, 2, 8) * 1j])
def test_what_others_wrote_into_a_cache_is_checked(model, saved, tensor):
    # Not by way of our writer, which refuses such tensors itself.
    path = saved[0].parent / "foreign.mem"
    with safe_open(saved[0], "pt") as opened:
        meta = opened.metadata()
    save_file({**load_file(saved[0]), "cache.0.0": tensor}, path, {**meta, "sha256": ""})
    length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    data = path.read_bytes()
    digest = file._digest(json.loads(data[8 : 8 + length]))
    digest.update(data[8 + length :])
    save_file({**load_file(saved[0]), "cache.0.0": tensor}, path, {**meta, "sha256": digest.hexdigest()})
    with pytest.raises(ValueError, match=r"foreign\.mem"):
        Session.load(path, model)


@pytest.mark.parametrize("key", ["version", "time", "id", "blocks", "sleep", "tags", "rule", "passes"])
def test_an_error_about_a_file_is_one_line_whatever_it_says(model, saved, key):
    text = json.dumps({"a\nb": ["c\nd", {"e\nf": "\n" * 5000}]})
    path = saved[0].parent / "lines.mem"
    path.write_bytes(saved[1])
    for value in (text, "x\ny", "NaN", "1e999", "[" * 5000):
        rewritten(path, **{key: value})
        data = path.read_bytes()
        index = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        digest = file._digest(index)
        digest.update(data[8 + struct.unpack("<Q", data[:8])[0] :])
        rewritten(path, sha256=digest.hexdigest(), **{key: value})
        try:
            Session.load(path, model)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 400 + len(str(path))
