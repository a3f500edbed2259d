import re
import tomllib
from pathlib import Path

import pytest
from tools import release

from lmsleep import __version__


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return release.build(tmp_path_factory.mktemp("dist"))


def test_the_wheel_works_away_from_the_checkout(built, tmp_path, capfd):
    commands = release.install(built[0], tmp_path / "environment")
    (tmp_path / "elsewhere").mkdir()
    release.try_out(commands, tmp_path / "elsewhere")
    assert "16 tokens" in capfd.readouterr().out


@pytest.mark.slow  # it installs torch
@pytest.mark.timeout(1200)
def test_the_wheel_works_in_an_empty_environment(built, tmp_path):
    commands = release.install(built[0], tmp_path / "environment", release.ROOT / "constraints.txt")
    (tmp_path / "elsewhere").mkdir()
    release.try_out(commands, tmp_path / "elsewhere")


def test_what_is_too_large_is_no_release(tmp_path, monkeypatch):
    adapters = sum(file.stat().st_size for file in release.SHIPPED.glob("*/adapter.safetensors"))
    monkeypatch.setitem(release.MAX_BYTES, ".whl", 1000 - adapters)
    with pytest.raises(ValueError, match=r"lmsleep-.*\.whl has .* bytes, more than 1,000"):
        release.build(tmp_path)


def test_one_version_everywhere():
    project = tomllib.loads((release.ROOT / "pyproject.toml").read_text())["project"]
    citation = (Path(release.ROOT) / "CITATION.cff").read_text()
    assert project["version"] == __version__ == re.search(r"^version: (.*)$", citation, re.M)[1]
