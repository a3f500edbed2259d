"""Notebooks, executed. `python docs/hooks/notebooks.py` writes their outputs anew (`make notebooks`)."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"


def execute(path: Path) -> Any:
    """The notebook with the outputs that its cells have now, run in an empty folder.

    Raises:
        CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=200,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        # Small models are faster on one thread, above all beside other tests.
        return client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})


def printed(notebook: Any) -> list[str]:
    """What each code cell printed.

    Raises:
        ValueError: for an output that is no text, which a comparison would pass over.
    """
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if strange := {o.output_type for cell in cells for o in cell.outputs} - {"stream"}:
        raise ValueError(f"notebooks print text; these outputs are something else: {', '.join(strange)}")
    return ["".join(output.text for output in cell.outputs) for cell in cells]


def main() -> None:
    """Execute all notebooks in place."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = execute(path)
        printed(notebook)
        notebook.metadata.language_info = {"name": "python"}  # not the version that happened to run
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
