"""What HTTP costs: a server on loopback in a process of its own, beside its engine's rows in this one."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.serve.waiting import Asked, Talks
from benchmarks.table import Cell, Table
from benchmarks.timing import ms, ratio
from lmsleep import HybridConfig, HybridLM
from lmsleep.session import Stream


def overhead(config: HybridConfig, *, window: int, count: int, tokens: int, repeats: int) -> Table:
    """Time answers of `count` streams at once, through HTTP and in process."""
    torch.manual_seed(0)
    model = HybridLM(config).eval()
    asked = Asked(config, window, question=window // 16, answer=tokens)
    seconds: dict[str, list[float]] = {"in process": [], "HTTP, streamed": [], "HTTP, at once": []}
    with TemporaryDirectory() as folder, _serving(model, Path(folder), asked) as url:
        for repeat in range(-1, repeats):  # the first is not counted
            # No prompt is the beginning of another, or was read before.
            prompts = [f"{i:03}{repeat:03}".ljust(asked.question, "x") for i in range(count)]
            talks = Talks(model, asked, count, 1, debt=window)
            talks.streams = [Stream.begin(model.initial_state(1)) for _ in prompts]
            for case, found in seconds.items():
                begin = time.perf_counter()
                if case == "in process":
                    talks.ask()
                else:
                    asyncio.run(_ask(url, prompts, tokens, stream=case == "HTTP, streamed"))
                if repeat >= 0:
                    found.append(time.perf_counter() - begin)
            talks.close()
    rows: list[dict[str, Cell]] = [
        {
            "answers": case,
            "ms": ms(found),
            "tokens/s": count * tokens / float(np.median(found)),
            "to in process": ratio(found, seconds["in process"]),
        }
        for case, found in seconds.items()
    ]
    note = (
        f"{count} completions of {tokens} tokens to prompts of {asked.question}, all at once: `lmsleep "
        "serve` in a process of its own, asked over loopback by one client, beside an engine in the client's "
        f"process. {asked}. One thread each for the model. Wall time of all answers, medians of {repeats} "
        "repeats that took turns; ratios within a repeat: median [10th ... 90th percentile]. The server "
        "keeps every answer on disk before it ends."
    )
    return Table(rows=rows, note=note)


async def _ask(url: str, prompts: list[str], tokens: int, stream: bool) -> None:
    """Ask for all completions at once. By hand, for a client library would count as the server's time."""
    host, port = url.removeprefix("http://").split(":")

    async def one(prompt: str) -> None:
        case = "streamed" if stream else "whole"
        said = {"model": "model", "prompt": case[0] + prompt[1:], "max_tokens": tokens, "stream": stream}
        body = json.dumps(said | {"temperature": 0}).encode()
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"the server said {answer[:200]!r}")
        if not stream:
            assert f'"completion_tokens":{tokens}'.encode() in answer.replace(b" ", b""), answer

    await asyncio.gather(*map(one, prompts))


@contextmanager
def _serving(model: HybridLM, folder: Path, asked: Asked) -> Iterator[str]:
    """Serve a model, with debt enough for an answer; yield the address."""
    model.save_pretrained(folder / "model")
    options = {
        "--port": 0, "--store": folder / "store", "--window": asked.window, "--passes": 1,
        "--debt": asked.window, "--debt-of": "turn", "--sleep-after": 3600, "--tokenizer": "bytes",
    }  # fmt: skip
    words = [str(word) for option in options.items() for word in option]
    command = [sys.executable, "-m", "lmsleep", "serve", str(folder / "model"), *words]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=alone) as process,
    ):
        try:
            assert process.stdout is not None
            told = re.search(r"at (http://\S+)", process.stdout.readline())
            if told is None:
                raise RuntimeError(f"the server told no address: {(folder / 'log').read_text()[-500:]}")
            yield told[1]
        finally:
            process.terminate()
            process.wait(60)
