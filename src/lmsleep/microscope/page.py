"""The microscope's page: answers in words, figures, tables; one file without scripts or network."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from lmsleep.html_page import framed
from lmsleep.microscope import words
from lmsleep.microscope.figures import figures
from lmsleep.microscope.seen import Row, Seen

SECTIONS = {
    "hypnogram": (
        "Hypnogram",
        "Above, how full the window is; below, the norm of all fast weights together. At a dotted line the "
        "window is slept on and evicted; dots are the passes asleep, or what a sleep of another kind left.",
    ),
    "heads": (
        "Heads",
        "Each line is a head, each point a pass over a window (of a sleep of another kind: read, and slept "
        "on); a cosine is missing where there is nothing to compare with.",
    ),
    "readback": (
        "Key readback",
        "S is queried with the key that each token wrote in the last pass. A token is retrieved if what is "
        "read is nearer to the value it wrote than to that of any other token of its window. Values of all "
        "tokens resemble each other, so a high cosine alone says little.",
    ),
    "probe": (
        "What a pass computes",
        "Accuracy of a linear probe on the hidden states h after each pass, for the quantity some steps "
        "ahead of what a token says itself; probes are fitted on other samples.",
    ),
    "ablation": (
        "Ablation",
        "What the answers lose if the fast weights of a head are set to zero, or replaced by those of "
        "another sequence, before they are asked.",
    ),
}  # fmt: skip


def page(seen: Seen) -> str:
    """Return the whole page as HTML."""
    parts = [
        _words("Three layers of memory", words.layers(seen)),
        _words("What does sleep change?", words.changes(seen)),
        _words("Can one rely on it?", words.reliability(seen) or ["Nothing was asked of the memory."]),
        *([_words("Not looked at", seen.notes)] if seen.notes else []),
    ]
    for name, figure in figures(seen).items():
        title, text = SECTIONS[name]
        image = io.BytesIO()
        # Pictures are part of the page, so that one file can be sent and kept.
        figure.savefig(image, dpi=120, format="png")
        data = base64.b64encode(image.getvalue()).decode()
        parts.append(
            f"<h2>{title}</h2>\n<p>{html.escape(text)}</p>\n"
            f'<img alt="{title}" src="data:image/png;base64,{data}">'
        )
    for title, rows in (
        ("Readings", seen.reliance),
        ("Ablations", seen.ablation),
        ("Sleeps", seen.change[-32:]),
    ):
        if rows:
            parts.append(f"<h2>{title}</h2>\n{_table(rows)}")
    about = ", ".join(
        f"{name.replace('_', ' ')} {seen.about[name]}"
        for name in ("model", "window", "way", "passes", "eviction", "sequences", "tokens")
    )
    subject = html.escape(str(seen.about["subject"]))
    top = f"<h1>Under the microscope: {subject}</h1>\n<p>{html.escape(about)}</p>"
    return framed(f"lmsleep inspect: {subject}", "\n".join([top, *parts]))


def _words(title: str, sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return f"<h2>{title}</h2>\n<ul>{items}</ul>"


def _table(rows: list[Row]) -> str:
    def cell(value: Any) -> str:
        if value is None:
            return ""
        return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))

    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{cell(x)}</td>" for x in row.values()) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"
