"""A server that is killed, starved and started again: forked off a process that has loaded all it needs."""

import http.client
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import torch
from conftest import lively, tiny

from lmsleep import Session, SleepConfig
from lmsleep.text.tokenizers import Bytes

WAIT = 60  # seconds; a test that hangs fails by it
L = 8


class Letters:
    # A model that writes letters alone: no answer ends before its time, and its text is its tokens again.

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return getattr(self.model, name)

    def head(self, h):
        logits = torch.full((*h.shape[:-1], 256), float("-inf"), dtype=h.dtype)
        letters = slice(ord("a"), ord("z") + 1)
        logits[..., letters] = self.model.head(h)[..., letters]
        return logits


def session():
    model = Letters(lively(tiny("attention", "gated_delta_net", vocab_size=256)))
    return Session(model, SleepConfig(window=L, passes=2), Bytes())


def nurse():
    # Reads a line of JSON for each server, forks it, and says how it ended once it is asked for.
    from lmsleep.serve.keys import Keys
    from lmsleep.serve.run import Settings, run

    begun = session()
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            _, status = os.waitpid(asked["wait"], 0)
            say(code=os.waitstatus_to_exitcode(status))
            continue
        if os.fork():
            continue
        options = {
            "debt": L // 4, "portion": 16, "most_waiting": 256, "most_rows": 16, "most_bytes": 200_000,
            "most_disk": None, "keep_days": None, "longest": 64,
            "debt_of": "answer", "sleep_after": 0.0, "shared": None,
            **asked["options"],
        }  # fmt: skip
        # PyTorch's pool of threads does not outlive a fork: made anew before two threads would at once.
        torch.set_num_threads(1)
        try:
            how = Settings(names=("tiny",), examples=(), keys=Keys(), store=Path(asked["store"]), **options)
            run(begun, how, "127.0.0.1", 0, lambda url: say(url=url, pid=os.getpid()))
            os._exit(0)
        except (ValueError, OSError) as error:
            say(error=str(error))
            os._exit(2)


def say(**what):
    os.write(1, (json.dumps(what) + "\n").encode())


class Nursery:
    # Starts servers.

    def __init__(self):
        code = (
            f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import faulty; faulty.nurse()"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def ask(self, **what):
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, store, **options):
        told = self.ask(store=str(store), options=options)
        return Server(self, told["url"], told["pid"])

    def close(self):
        self.process.stdin.close()
        self.process.wait(WAIT)
        self.process.stdout.close()


class Server:
    def __init__(self, nursery, url, pid):
        self.nursery, self.url, self.pid = nursery, url, pid
        self.address = urlsplit(url).netloc

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    def end(self, number=signal.SIGKILL):
        self.kill(number)
        return self.wait()

    def wait(self):
        return self.nursery.ask(wait=self.pid)["code"]

    def limit_files(self, most):
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    def connection(self):
        return http.client.HTTPConnection(self.address, timeout=WAIT)

    def ask(self, method, path, body=None):
        # Status and JSON.
        connection = self.connection()
        try:
            connection.request(
                method,
                path,
                None if body is None else json.dumps(body),
                {"Content-Type": "application/json"},
            )
            answer = connection.getresponse()
            data = answer.read()
            return answer.status, json.loads(data) if data.startswith(b"{") else data.decode()
        finally:
            connection.close()

    def respond(self, text, previous=None, tokens=6, **more):
        body = {"model": "tiny", "input": text, "temperature": 0, "max_output_tokens": tokens, **more}
        if previous is not None:
            body["previous_response_id"] = previous
        return self.ask("POST", "/v1/responses", body)

    def metric(self, line):
        _, text = self.ask("GET", "/metrics")
        return sum(float(m.rpartition(" ")[2]) for m in text.splitlines() if m.startswith(f"lmsleep_{line}"))

    def under_way(self):
        # Requests that are not done, of one answer: between two they may change their state.
        _, text = self.ask("GET", "/metrics")
        states = ("awake", "due", "asleep")
        return sum(
            float(m.rpartition(" ")[2])
            for m in text.splitlines()
            if m.startswith(tuple(f'lmsleep_sessions{{model_name="tiny",state="{s}"}}' for s in states))
        )

    def until(self, what):
        # Wait for something to become true.
        end = time.monotonic() + WAIT
        while not what():
            assert time.monotonic() < end, "it never came"
            time.sleep(0.05)


def text_of(response):
    return "".join(
        part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"]
    )
