import logging
import re
from pathlib import Path

import noxfile
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = noxfile.PYPROJECT["project"]


def test_the_oldest_of_a_range_is_its_lower_bound():
    found = [noxfile.oldest(Requirement(line)) for line in ("a>=1.0,<1.1", "b-c>=2", "d!=3.1,>=3.0.1")]
    assert found == ["a==1.0", "b-c==2", "d==3.0.1"]


@pytest.mark.parametrize("line", ["a", "a<2", "a==1.0", "a>1"])
def test_a_range_without_a_lower_bound_is_refused(line):
    with pytest.raises(ValueError, match=r"a.* has no lower bound; declare a>=VERSION"):
        noxfile.oldest(Requirement(line))


def test_environments_hold_what_is_declared():
    declared = noxfile.ranges(
        {
            "build-system": {"requires": ["builder>=1"]},
            "project": {
                "dependencies": ["Base_One>=2"],
                "optional-dependencies": {"x": ["y.z>=3"], "cuda": ["k>=4"], "dev": ["y-z==5", "tool==6"]},
            },
        }
    )
    assert [str(each) for each in declared.values()] == ["Base_One>=2", "builder>=1", "y.z>=3"]
    assert list(declared) == ["base-one", "builder", "y-z"]


@pytest.mark.parametrize("name", noxfile.ranges(noxfile.PYPROJECT))
def test_the_newest_that_is_tested_lies_in_the_declared_range(name, monkeypatch):
    # One pin for each range, in `dev` or, where a build is meant, in constraints.txt.
    monkeypatch.setattr(noxfile, "CONSTRAINTS", ROOT / "constraints.txt")
    found = [each[name] for each in (noxfile.pins(noxfile.PYPROJECT), noxfile.constrained()) if name in each]
    [[pin]] = [each.specifier for each in found]
    declared = noxfile.ranges(noxfile.PYPROJECT)[name]
    assert pin.operator == "==" and pin.version in declared.specifier
    assert noxfile.oldest(declared)


def test_pythons_are_those_of_the_classifiers():
    assert PROJECT["requires-python"] == f">={noxfile.OLDEST_PYTHON}"
    said = {
        "README.md": r"Python (3\.\d+)",
        "Makefile": r"Python (3\.\d+) or newer",
    }
    for file, pattern in said.items():
        assert set(re.findall(pattern, (ROOT / file).read_text())) <= {noxfile.OLDEST_PYTHON}, file


@pytest.mark.parametrize("file", ["README.md", "constraints.txt"])
def test_where_the_oldest_torch_is_named_it_is_the_declared(file):
    oldest = noxfile.oldest(noxfile.ranges(noxfile.PYPROJECT)["torch"]).partition("==")[2]
    found = re.findall(r"torch(?: of your own \(|\s*>= ?)(\d+\.\d+)", (ROOT / file).read_text())
    assert found == [oldest]


@pytest.mark.parametrize("library", ["transformers.models", "datasets.load", "huggingface_hub.utils", "peft"])
def test_a_deprecation_that_is_logged_is_an_error_too(library):
    with pytest.raises(DeprecationWarning, match="that is deprecated"):
        logging.getLogger(library).warning("%s is deprecated", "that")
