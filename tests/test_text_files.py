"""Files of text are known by what is in them: read, or refused in a line that names them."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import threading
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import lively, run_command, tiny
from hypothesis import given
from hypothesis import strategies as st

from lmsleep import Session, SleepConfig
from lmsleep.session import read_files
from lmsleep.tasks import Text, batch_rng
from lmsleep.text.documents import read_set
from lmsleep.text.files import FORMATS, read_text
from lmsleep.text.rows import has_rows
from lmsleep.text.tokenizers import Bytes, Words

PROSE = "Schlaf, 眠り, sleep. " * 40
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", PROSE)
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    return file.getvalue()


def parquet(rows=({"text": "a"},)):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file.getvalue()


def arrow(rows=({"text": "a"},), opened=pa.ipc.new_file):
    file, table = io.BytesIO(), pa.Table.from_pylist(list(rows))
    with opened(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


# Text


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("ending", PACK)
def test_a_text_is_the_same_however_it_is_packed_and_marked(tmp_path, encoding, ending):
    path = tmp_path / "a.txt"  # the ending says nothing
    path.write_bytes(PACK[ending](PROSE.encode(encoding)))
    assert read_text(path).decode() == PROSE and not has_rows(path)


@given(st.binary(max_size=200))
def test_bytes_that_are_nothing_else_are_read_as_they_are(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(b"x" + data)
    halves = ((b"x" + data)[::2], data[::2])
    if all(not half or half.count(0) / len(half) <= 0.2 for half in halves):
        assert read_text(path) == b"x" + data


REFUSED = {
    "zip": zipped(),
    "tar": tarred(),
    "a tar in gzip": gzip.compress(tarred()),
    "Parquet": parquet(),
    "Arrow": arrow(),
    "an Arrow stream": arrow(opened=pa.ipc.new_stream),
    "half a gzip": gzip.compress(np.random.default_rng(0).bytes(5000))[:3000],
    "half an xz": lzma.compress(np.random.default_rng(0).bytes(5000))[:3000],
    "half a bzip2": bz2.compress(np.random.default_rng(0).bytes(5000))[:3000],
    "half of UTF-16": "ab".encode("utf-16")[:-1],
    "UTF-16 without a mark": PROSE.encode("utf-16-le"),
    "UTF-16 without a mark, big end first": PROSE.encode("utf-16-be"),
    "UTF-32 without a mark": PROSE.encode("utf-32-le"),
    "zeros": bytes(5000),
    **{what: magic + b"and so on" for magic, (what, _) in FORMATS.items()},
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_what_is_no_text_is_refused_by_its_content(tmp_path, data):
    path = tmp_path / "book.txt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"book\.txt (is|holds)") as refused:
        read_text(path)
    assert "\n" not in str(refused.value)


def test_a_device_is_no_file_and_a_pipe_is_read_once(tmp_path):
    with pytest.raises(ValueError, match=r"/dev/zero is a device"):
        read_text(type(tmp_path)("/dev/zero"))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=[gzip.compress(b"from a pipe")])
    writer.start()
    assert read_text(pipe) == b"from a pipe"
    writer.join()


def test_a_session_reads_what_the_file_says(tmp_path):
    model = lively(tiny("gated_delta_net", vocab_size=256))
    for name, data in {"u16": "two words".encode("utf-16"), "gz": gzip.compress(b"two words")}.items():
        (tmp_path / name).write_bytes(data)
        for tokenizer in (Bytes(), Words(["two", "words"])):
            session = Session(model, SleepConfig(window=64), tokenizer)
            read_files(session, [tmp_path / name])
            assert session.stream.window.tolist() == tokenizer.encode("two words")
    (tmp_path / "latin").write_bytes("Frösche".encode("latin-1"))
    with pytest.raises(ValueError, match="latin is not UTF-8"):
        read_files(session, [tmp_path / "latin"])


@pytest.mark.parametrize(
    "argv",
    [
        ["read", "depo-N4", "FILE", "--memory", "m.mem"],
        ["inspect", "depo-N4", "--file", "FILE"],
        ["probe", "depo-N4", "--text", "FILE"],
        ["data", "text", "--data", "FILE"],
    ],
    ids=lambda argv: argv[0],
)
def test_every_command_names_the_file_that_it_cannot_read(argv, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packed.txt").write_bytes(zipped())
    (tmp_path / "wide.txt").write_bytes(PROSE.encode("utf-16-le"))
    (tmp_path / "half.txt").write_bytes(gzip.compress(PROSE.encode())[:-9])
    for name in ("packed.txt", "wide.txt", "half.txt"):
        code, out, err = run_command(capsys, *[name if word == "FILE" else word for word in argv])
        assert code == 2 and name in err and err.count("\n") == 1 and not out
    assert not list(tmp_path.glob("*.mem"))


# Rows

ROWS = [{"text": f"{i} words, one after the other"} for i in range(40)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = b"text\n" + b"".join(b'"%s"\n' % row["text"].encode() for row in ROWS)
IN_FILES = {
    "a.jsonl": LINES,
    "a.JSONL": LINES,
    "a.ndjson": LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "a.jsonl.xz": lzma.compress(LINES),
    "a.bz2": bz2.compress(LINES),
    "marked.jsonl": b"\xef\xbb\xbf" + LINES,
    "wide.jsonl": LINES.decode().encode("utf-16"),
    "lines.txt": LINES,
    "wide.txt": LINES.decode().encode("utf-16"),
    "lines.json": LINES,
    "a.json": json.dumps(ROWS).encode(),
    "indented.json": json.dumps(ROWS, indent=1).encode(),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "array": json.dumps(ROWS, indent=2).encode(),
    "a.csv": CSV,
    "a.CSV.gz": gzip.compress(CSV),
    "a.tsv": CSV,
    "a.parquet": parquet(ROWS),
    "parquet.txt": parquet(ROWS),
    "a.arrow": arrow(ROWS),
    "stream.arrow": arrow(ROWS, pa.ipc.new_stream),
}


@pytest.mark.parametrize("name", IN_FILES)
def test_rows_are_the_same_in_whatever_file_they_stand(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(IN_FILES[name])
    assert has_rows(path)
    assert [document.fields for document in read_set(path)] == [(row["text"],) for row in ROWS]


@pytest.mark.parametrize(
    "text",
    ["{ is a brace, and } another", '{"text": "one"', "[1] A footnote.", "[{", "{}x", "text,more\n1,2\n", ""],
)
def test_a_text_that_looks_a_little_like_rows_is_a_text(tmp_path, text):
    path = tmp_path / "a.txt"
    path.write_text(text)
    assert not has_rows(path)


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.json", b'{"data":\n[]}', r"a\.json"),
        ("a.json", b'[{"text": "a"}, 3]', r"a\.json, row 2: must be a JSON object, got int"),
        ("a.json", b'[{"text": "a"},\n {"text": ]', r"a\.json: not JSON: .* line 2"),
        ("a.json", b"[" * 100_000, r"a\.json: not JSON"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, r"a\.jsonl, line 1: not JSON"),
        ("a.csv", b"text,id\na,1\nb\n", r"a\.csv, line 3: 1 fields, the first line names 2"),
        ("a.csv", b'text\n"a\n', r"a\.csv, line 2: no CSV"),
        ("a.csv", "text\nFrösche\n".encode("latin-1"), r"a\.csv is not UTF-8"),
        ("a.csv", b"body\na\n", r"a\.csv, line 2: none of .* name the text's"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet is damaged"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", r"a\.parquet"),
        ("a.arrow", arrow(ROWS)[:-20], r"a\.arrow is damaged"),
        ("a.parquet", parquet([{"text": float("nan")}]), r"row 1: field 'text' must be .* got nan"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-9], r"a\.jsonl\.gz is damaged"),
    ],
)
def test_damaged_rows_are_named(tmp_path, name, data, said):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=said) as refused:
        list(read_set(path))
    assert "\n" not in str(refused.value)


def test_long_fields_of_csv(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "word " * 50_000)
    [document] = read_set(tmp_path / "a.csv")
    assert len(document.fields[0]) == 250_000


def test_files_of_both_kinds_are_not_mixed(tmp_path):
    (tmp_path / "book").write_text(PROSE)
    (tmp_path / "rows").write_bytes(LINES)
    with pytest.raises(ValueError, match="not both"):
        Text(data=(tmp_path / "book", tmp_path / "rows")).batch(batch_rng(0, "train", 0), 1, "train")
