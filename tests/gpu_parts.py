"""Parts for `benchmarks.gpu` that end in every way; what they are told stands in the environment."""

import os
import time
from pathlib import Path

from benchmarks.gpu.part import Disagrees
from benchmarks.table import Table

TABLE = Table(rows=[{"a": 1}], note="A table.")


def good(run):
    with Path(os.environ["GPU_PARTS"]).open("a") as file:
        file.write("good\n")
    return TABLE


def wrong(run):
    if "wrong" in Path(os.environ["GPU_PARTS"]).read_text():
        run.keep(TABLE)
        raise Disagrees("1 of 2\ndiffers")
    return TABLE


def dies(run):
    os._exit(3)


def hangs(run):
    time.sleep(600)
