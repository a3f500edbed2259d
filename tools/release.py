"""Build wheel and sdist into dist/, and try the wheel away from the checkout. Nothing is uploaded.

python tools/release.py CONSTRAINTS
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]
# Shipped runs and the demo's result; results and docs. Shipped adapters, 20 MB each at most, come on top.
MAX_BYTES = {".whl": 3_000_000, ".gz": 5_000_000}
SHIPPED = ROOT / "src/lmsleep/shipped"
GRAPH = "n8 n4 n7 n8 n2 n5 n5 n1 n1 n6 n4 n3 n3 n2 n6 n7"


def build(out: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it, into `out`; return wheel and sdist.

    Raises:
        ValueError: if one is too large, or the wheel lacks something.
    """
    # --no-isolation: what the build needs is installed already, and no network is asked. With neither --wheel
    # nor --sdist the wheel is built from the sdist, so that what the sdist lacks shows here.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=_environment())
    wheel, sdist = next(out.glob("*.whl")), next(out.glob("*.tar.gz"))
    adapters = sum(file.stat().st_size for file in SHIPPED.glob("*/adapter.safetensors"))
    for file in (wheel, sdist):
        size, most = file.stat().st_size, MAX_BYTES[file.suffix] + adapters
        sys.stdout.write(f"{file.name}: {size:,} bytes (at most {most:,})\n")
        if size > most:
            raise ValueError(f"{file.name} has {size:,} bytes, more than {most:,}; leave something out")
    names = ZipFile(wheel).namelist()
    # Package data are what a build forgets without an error.
    shipped = [file.relative_to(ROOT / "src").as_posix() for file in SHIPPED.glob("*/**/*") if file.is_file()]
    needed = ["lmsleep/py.typed", *(name for name in shipped if "__pycache__" not in name)]
    if missing := [name for name in needed if name not in names]:
        raise ValueError(f"{wheel.name} lacks {', '.join(missing)}")
    if strange := {name.partition("/")[0] for name in names if not name.startswith("lmsleep")}:
        raise ValueError(f"{wheel.name} holds more than lmsleep: {', '.join(sorted(strange))}")
    return wheel, sdist


def install(wheel: Path, folder: Path, constraints: Path | None = None) -> Path:
    """Install the wheel into a new environment in `folder` and return the environment's folder of commands.

    Args:
        wheel: what is installed.
        folder: of the environment, which must not exist.
        constraints: a file that pins torch; everything that lmsleep needs is installed too. None: the
            environment sees the packages of the one that runs, which takes seconds.
    """
    bin_folder = folder / ("Scripts" if os.name == "nt" else "bin")
    venv.create(folder, with_pip=constraints is not None)
    python = str(bin_folder / "python")
    if constraints is not None:
        command = [python, "-m", "pip", "install", "--quiet", "-c", str(constraints.resolve()), str(wheel)]
    else:
        here = [sys.executable, "-m", "pip", "--python", python]
        command = [*here, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
        # Where the new environment keeps its packages, by this interpreter, which is of the same version.
        packages = sysconfig.get_path("purelib", vars={"base": str(folder)})
        # A plain path: .pth files that lie there, such as that of an editable lmsleep, are not read.
        (Path(packages) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run(command, check=True, env=_environment())
    return bin_folder


def try_out(commands: Path, folder: Path) -> None:
    """Read, ask and import with what is installed beside `commands`, in the empty `folder`.

    Raises:
        ValueError: if something answers wrongly.
        CalledProcessError: if something fails.
    """
    (folder / "graph.txt").write_text(GRAPH)

    # In an empty folder, so that no checkout is imported from the current one.
    def say(program: str, *words: str) -> str:
        line, environment = [str(commands / program), *words], _environment()
        run = subprocess.run(line, cwd=folder, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        return run.stdout.strip()

    where = Path(say("python", "-c", "import lmsleep; print(lmsleep.__file__)"))
    # The check is worth nothing if the sources answer in place of the wheel.
    if not where.is_relative_to(commands.parent):
        raise ValueError(f"lmsleep came from {where}, not from {commands.parent}")
    read = say("lmsleep", "read", "depo-N4", "graph.txt", "--memory", "g.mem")
    answers = {
        "--version": say("lmsleep", "--version"),
        "n1, three hops": say("lmsleep", "ask", "depo-N4", "--memory", "g.mem", "HOP_3 n1"),
    }
    sys.stdout.write(f"{where.parent}\n{read}\n{answers}\n")
    # From n1 three edges of GRAPH on: n6, n7, n8.
    expected = {"--version": f"lmsleep {_version()}", "n1, three hops": "n8"}
    if answers != expected:
        raise ValueError(f"the installed wheel says {answers}, not {expected}")


def _version() -> str:
    """Read the version that pyproject.toml says."""
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return version


def _environment() -> dict[str, str]:
    """Return the environment without what would lead back to the checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def main() -> None:
    """Build into dist/, install with everything into an empty environment, try."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    dist = ROOT / "dist"
    # Old files would be taken for those that were just built.
    shutil.rmtree(dist, ignore_errors=True)
    wheel, _ = build(dist)
    with TemporaryDirectory() as folder:
        commands = install(wheel, Path(folder) / "environment", Path(sys.argv[1]))
        (Path(folder) / "elsewhere").mkdir()
        try_out(commands, Path(folder) / "elsewhere")


if __name__ == "__main__":
    main()
