"""python -m benchmarks.gpu.environment FOLDER: what to measure with, around the PyTorch that is there.

Run it with the Python whose PyTorch sees the GPU. What this Python has stays as it is and is found from the
new environment; what is missing is installed there, from PyPI or from a folder of wheels. Where this Python
has no PyTorch, the one that constraints.txt pins is installed.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
import venv
from importlib.util import find_spec
from pathlib import Path

from benchmarks.arguments import Parser

ROOT = Path(__file__).parents[2]
# Without these fewer parts run: each of them says so itself.
WISHED = {"hf": "transformers", "cuda": "flash-linear-attention", "dev": "pytest pytest-timeout hypothesis"}


def main(argv: list[str]) -> None:
    """Make it; leave with 1 if what everything needs is not to be had."""
    parser = Parser(prog="python -m benchmarks.gpu.environment", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wheels", type=Path, help="install from this folder, and from nowhere else")
    options = parser.parse_args(argv)
    if options.wheels and not options.wheels.is_dir():
        parser.error(f"--wheels: there is no folder {options.wheels}")
    # Where this Python has pip, it is found like everything else.
    venv.create(options.folder, with_pip=find_spec("pip") is None, clear=True, symlinks=os.name != "nt")
    python = options.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    for site in options.folder.glob("[lL]ib*/**/site-packages"):
        # --system-site-packages would pass over the packages of an environment.
        (site / "machine.pth").write_text("".join(f"{path}\n" for path in sites()))
    pins = options.folder / "torch.txt"
    pins.write_text(f"torch=={importlib.metadata.version('torch')}\n" if find_spec("torch") else
                    (ROOT / "constraints.txt").read_text())  # fmt: skip
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(pins)]
    pip += ["--no-index", "--find-links", str(options.wheels)] if options.wheels else []
    needed, wished = requirements()
    if subprocess.run([*pip, *needed], check=False).returncode:
        parser.exit(1, f"{parser.prog}: pip could not install what lmsleep needs: {' '.join(needed)}\n")
    for wish in wished:
        if subprocess.run([*pip, wish], check=False).returncode:
            print(f"without {wish}: pip could not install it; the parts that need it will say so", flush=True)


def sites() -> list[str]:
    """Return the folders in which this Python finds packages."""
    return [str(Path(path).resolve()) for path in sys.path
            if Path(path).name in ("site-packages", "dist-packages")]  # fmt: skip


def requirements() -> tuple[list[str], list[str]]:
    """Return what lmsleep needs, and what else is measured with, as pyproject.toml has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wished = []
    for extra, names in WISHED.items():
        for each in project["optional-dependencies"][extra]:
            name = re.match(r"[\w.-]+", each)
            if name and name[0] in names.split():
                # The pins of the suite are no need: any version will do.
                wished.append(name[0] if extra == "dev" else each)
    return project["dependencies"], wished


if __name__ == "__main__":
    main(sys.argv[1:])
