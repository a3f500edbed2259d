import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import nbformat
import pytest
from docs.hooks.notebooks import FOLDER, execute, printed

ROOT = Path(__file__).parents[1]
CARD = "src/lmsleep/shipped/README.md"
NUMBER = re.compile(r"\d+\.\d+")


def build(root, out):
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--config-file",
        root / "mkdocs.yml",
        "--site-dir",
        out,
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)


def test_the_site_is_built_strictly_and_names_every_public_name(tmp_path):
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "docs/notebooks/first-sleep.html").read_text()
    assert "<h1" in page and "n8" in page
    assert not re.search(r"<(script|link|img)[^>]*(src|href)=.?https?:", page)  # nothing comes from elsewhere
    public = json.loads((ROOT / "tests/golden/names.json").read_text())
    for module in sorted(set(public) - {"lmsleep.cli"}):
        page = (tmp_path / f"api/{module}.html").read_text()
        # Our classes and functions; a type or a table speaks for itself, and a room has its own page.
        values = {name: getattr(import_module(module), name) for name in public[module]}
        names = [name for name, value in values.items() if hasattr(value, "__qualname__")]
        names = [name for name in names if values[name].__module__.startswith("lmsleep")]
        missing = [n for n in names if not re.search(rf'id="{module}\.({n}\.)?{n}"', page)]
        assert not missing, f"{module}: {missing}"


def test_a_broken_link_in_the_readme_fails(tmp_path):
    links = {
        "docs/nothing.md": "a link 'docs/nothing.md', but the target is not found",
        "docs/demo.md#nothing": "'docs/demo.md#nothing', "
        "but the doc 'docs/demo.md' does not contain an anchor",
    }
    root = tmp_path / "repository"
    shutil.copytree(ROOT / "docs", root / "docs")
    others = (ROOT / name for name in ("mkdocs.yml", "LICENSE", "CITATION.cff", CARD))
    results = (ROOT / "results").glob("*/*.[mp][dn]*")
    for path in (*ROOT.glob("*.md"), *results, *others):
        (root / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / path.relative_to(ROOT))
    added = "".join(f"\n[there]({link})\n" for link in links)
    (root / "README.md").write_text((root / "README.md").read_text() + added)
    done = build(root, tmp_path / "site")
    assert done.returncode == 1 and all(said in done.stderr for said in links.values()), done.stderr
    assert done.stderr.count("WARNING") == len(links), done.stderr


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.ipynb")))
def test_notebooks_print_what_they_show(name):
    path = FOLDER / f"{name}.ipynb"
    shown, now = printed(nbformat.read(path, as_version=4)), printed(execute(path))
    assert [NUMBER.sub("#", text) for text in now] == [NUMBER.sub("#", text) for text in shown]
    figures = ([float(x) for text in texts for x in NUMBER.findall(text)] for texts in (now, shown))
    assert next(figures) == pytest.approx(next(figures), abs=0.06)  # another processor rounds otherwise
