import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import lively, random_tokens, run_command, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from served import write_model
from test_serve_store import SLEEP, L, read, read_on, same

from lmsleep import Session, SleepConfig
from lmsleep.serve.errors import ApiError
from lmsleep.serve.shared import Moved
from lmsleep.serve.store import Store


@pytest.fixture(scope="module")
def model():
    return lively(tiny("attention", "gated_delta_net"))


@pytest.fixture
def two(model, tmp_path):
    # Two servers of one model, each with a copy of its own.
    stores = [Store(tmp_path / name, model, SLEEP, shared=f"file://{tmp_path}/shared") for name in "ab"]
    yield stores
    for store in stores:
        store.close()


def test_what_one_server_kept_another_takes_over_and_goes_on_with_exactly(model, two):
    first, second = two
    assert first.take("ann") and not first.take("ann")
    kept, session = first.nothing(), Session(model, SLEEP)
    for i, count in enumerate((3, 2 * L + 1, L)):
        tokens = random_tokens(count, seed=i)
        kept = read(model, first, "ann", kept, tokens)
        session.read(tokens)
        first.put("ann", "response", f"r{i}", {"number": i}, kept.id)
    first.put_unread("ann", "r0", random_tokens(9))
    assert second.find("ann", kept.id) is None
    assert second.take("ann")
    there = second.find("ann", kept.id)
    assert [thing.id for thing in second.all("ann", "response")] == ["r2", "r1", "r0"]
    assert torch.equal(second.unread("r0"), random_tokens(9))
    session.read(random_tokens(L + 2, seed=7))
    same(read_on(model, there, random_tokens(L + 2, seed=7)), session.stream)
    assert second.bytes("ann")["disk"] > 0 and second.bytes("ben")["disk"] == 0


def test_who_has_lost_an_owner_writes_nothing_and_another_owner_stays(model, two):
    first, second = two
    for owner in ("ann", "ben"):
        first.take(owner)
        kept = read(model, first, owner, first.nothing(), random_tokens(L + 1))
        first.put(owner, "memory", f"m-{owner}", {"name": owner}, kept.id)
    second.take("ann")
    for change in (
        lambda: first.put("ann", "memory", "m-ann", {"name": "late"}),
        lambda: first.delete("ann", "memory", "m-ann"),
        lambda: read(model, first, "ann", first.nothing(), random_tokens(3)),
    ):
        with pytest.raises(Moved):
            change()
    assert first.sweep() == 0  # of its copy it may let go, and nobody is told
    assert second.get("ann", "memory", "m-ann").body == {"name": "ann"}
    first.put("ben", "memory", "m-ben", {"name": "still"}, first.get("ben", "memory", "m-ben").stream)
    assert second.get("ben", "memory", "m-ben") is None  # not held, so not known
    assert first.take("ann") and first.get("ann", "memory", "m-ann").body == {"name": "ann"}


def test_what_is_deleted_is_gone_for_all_and_leaves_no_file(model, two, tmp_path):
    first, second = two
    first.take("ann")
    kept = read(model, first, "ann", first.nothing(), random_tokens(2 * L + 1))
    first.put("ann", "response", "r", {}, kept.id)
    files = [path for path in (tmp_path / "shared").rglob("*") if path.is_file()]
    assert len(files) == 6  # about, holder, a start and its file, a stream, a document
    assert first.delete("ann", "response", "r")
    left = [path.name for path in (tmp_path / "shared").rglob("*") if path.is_file()]
    assert sorted(left) == ["about", "holder"]
    assert second.take("ann") and second.get("ann", "response", "r") is None


@settings(max_examples=12)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(["keep", "delete", "change"]), st.integers(0, 3)),
        max_size=8,
    )
)
def test_an_owner_that_moves_about_has_what_one_that_stays_has(model, tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("moving")
    stores = {name: Store(folder / name, model, SLEEP, shared=f"file://{folder}/shared") for name in "ab"}
    alone = Store(folder / "alone", model, SLEEP)
    for name, what, number in steps:
        stores[name].take("ann")
        for store in (stores[name], alone):
            old = store.get("ann", "memory", f"m{number}")
            if what == "keep" and old is None:
                kept = read(model, store, "ann", store.nothing(), random_tokens(3 * number, seed=number))
                store.put("ann", "memory", f"m{number}", {"n": number}, kept.id)
            elif what == "delete":
                assert store.delete("ann", "memory", f"m{number}") == (old is not None)
            elif old is not None:
                kept = store.find("ann", old.stream)
                kept = read(model, store, "ann", kept, random_tokens(L, seed=9))
                store.put("ann", "memory", old.id, {"n": old.body["n"] + 10}, kept.id)
    for name in "ab":
        stores[name].take("ann")
        mine, its = (store.all("ann", "memory") for store in (stores[name], alone))
        assert [(t.id, t.body) for t in mine] == [(t.id, t.body) for t in its]
        for one, other in zip(mine, its, strict=True):
            found = stores[name].find("ann", one.stream), alone.find("ann", other.stream)
            same(*(read_on(model, kept, random_tokens(0)) for kept in found))
    for store in (*stores.values(), alone):
        store.close()


def test_a_place_that_is_no_place_or_another_model_s_is_refused(model, tmp_path):
    Store(tmp_path / "a", model, SLEEP, shared=f"file://{tmp_path}/shared").close()
    other = SleepConfig(window=L, passes=3)
    with pytest.raises(ValueError, match=r"shared=.* belongs to .*name another address"):
        Store(tmp_path / "b", model, other, shared=f"file://{tmp_path}/shared")
    with pytest.raises(ValueError, match=r"shared=nowhere://x cannot be used"):
        Store(tmp_path / "c", model, SLEEP, shared="nowhere://x")


def test_a_place_that_cannot_be_written_loses_nothing(model, two, tmp_path, monkeypatch):
    first, _ = two
    first.take("ann")
    kept = read(model, first, "ann", first.nothing(), random_tokens(3))
    first.put("ann", "response", "r", {"old": True}, kept.id)

    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(first.shared, "_write", full)
    with pytest.raises(ApiError) as error:
        first.put("ann", "response", "r", {"old": False}, kept.id)
    assert error.value.status == 507 and str(tmp_path) not in str(error.value)
    monkeypatch.undo()
    assert first.get("ann", "response", "r").body == {"old": True}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--ray", "0"], "ray must be at least 1 replica, got 0"),
        (["--ray", "2", "--shared", "file:///tmp/x"], "name --keys"),
        (["--ray", "2", "--keys", "keys"], "name --shared"),
        (["--ray", "2", "--keys", "keys", "--shared", "file:///tmp/x"], "pip install 'lmsleep[ray]'"),
        (["--shared", "nowhere://x"], "shared=nowhere://x cannot be used"),
        (["--sleep-after", "1"], "name --debt-of turn"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(capsys, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    (tmp_path / "keys").write_text(f"ann {'0' * 20}\n")
    code, _, err = run_command(capsys, "serve", "--port", "0", *argv)
    assert code == 2 and said in err and len(err.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_replica_that_dies_is_taken_over_from(tmp_path):
    pytest.importorskip("ray")
    openai = pytest.importorskip("openai")
    write_model(tmp_path / "model")
    keys = {name: f"{name}-{'0' * 20}" for name in ("ann", "ben", "cid", "dan", "eve", "fay")}
    (tmp_path / "keys").write_text("".join(f"{name} {key}\n" for name, key in keys.items()))
    command = [sys.executable, "-m", "lmsleep", "serve", tmp_path / "model", "--port", 0, "--ray", 2]
    command += ["--shared", f"file://{tmp_path}/shared", "--keys", tmp_path / "keys"]
    command += ["--store", tmp_path / "store", "--window", 16, "--device", "cpu"]
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True) as process:
        try:
            told = next(line for line in process.stdout if "at http://" in line)
            url = told.split()[-1]
            clients = {
                name: openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=8)
                for name, key in keys.items()
            }
            how = {"model": "model", "max_output_tokens": 6, "temperature": 0}
            firsts = {n: c.responses.create(input=f"{n} says this " * 3, **how) for n, c in clients.items()}

            def go_on():
                return {
                    n: c.responses.create(input="and then?", previous_response_id=firsts[n].id, **how)
                    for n, c in clients.items()
                }

            before = go_on()
            assert all(r.usage.input_tokens_details.cached_tokens > 0 for r in before.values())
            holders = {path.parent.name: path.read_text() for path in tmp_path.glob("shared/*/holder")}
            assert len(holders) == 6 and len(set(holders.values())) == 2  # both replicas have some
            replicas = [
                int(p.name) for p in Path("/proc").glob("[0-9]*") if "ServeReplica:lmsleep" in _command(p)
            ]
            assert len(replicas) == 2
            os.kill(replicas[0], signal.SIGKILL)
            after = go_on()
            assert {n: r.output_text for n, r in after.items()} == {
                n: r.output_text for n, r in before.items()
            }
            time.sleep(30)  # another one has come up, and some keys are its own now
            again = go_on()
            assert {n: r.output_text for n, r in again.items()} == {
                n: r.output_text for n, r in before.items()
            }
        finally:
            process.terminate()
            process.wait(120)


def _command(process):
    try:
        return (process / "cmdline").read_text()
    except OSError:  # it has just ended
        return ""
