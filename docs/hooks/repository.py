"""The pages of the site: those of the repository in their places, notebooks, and the API reference.

mkdocs calls `on_config`, then `on_files`.
"""

from pathlib import Path

import nbconvert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

SHOWN = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "LICENSE"),
    *("docs/*.md", "docs/images/*", "docs/hooks/wide.css", "results/*/README.md", "results/*/figure.png"),
    "src/lmsleep/shipped/README.md",
)


class Notebook(File):
    """A page under the name of its notebook, so that a link to it holds in a checkout too."""

    def is_documentation_page(self) -> bool:
        """It is a page, though its name does not end in .md."""
        return True


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill the navigation's list of modules."""
    modules = _modules(Path(config.config_file_path).parent / "src")
    entry = next(entry for entry in config.nav or () if "API" in entry)
    entry["API"] = [{module: _page(module)} for module in modules]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """All files of the site, by their paths in the repository; of those that mkdocs found, the theme's."""
    root = Path(config.config_file_path).parent
    theme = [file for file in files if file.src_dir != config.docs_dir]
    shown = [path for pattern in SHOWN for path in root.glob(pattern)]
    return Files(
        [
            *theme,
            *(File.generated(config, str(p.relative_to(root)), abs_src_path=str(p)) for p in shown),
            *(_notebook(config, p, root) for p in (root / "docs/notebooks").glob("*.ipynb")),
            *(_reference(config, module, root / "src") for module in _modules(root / "src")),
        ]
    )


def _modules(sources: Path) -> list[str]:
    """The packages that say which of their names are public; what the command line is made of is not."""
    packages = [file for file in sources.rglob("__init__.py") if "__all__" in file.read_text()]
    names = [".".join(file.parent.relative_to(sources).parts) for file in packages]
    return sorted({*names} - {"lmsleep.cli"})


def _reference(config: MkDocsConfig, module: str, sources: Path) -> File:
    """All public names of a package; one that a file of the package bears too would be left out."""
    folder = sources / module.replace(".", "/")
    public = (folder / "__init__.py").read_text().partition("__all__")[2]
    hidden = [file.stem for file in sorted(folder.glob("*.py")) if f'"{file.stem}"' in public]
    content = "\n".join(f"::: {name}\n" for name in (module, *(f"{module}.{name}" for name in hidden)))
    return File.generated(config, _page(module), content=content)


def _page(module: str) -> str:
    return f"api/{module}.md"


def _notebook(config: MkDocsConfig, path: Path, root: Path) -> File:
    text, _ = nbconvert.MarkdownExporter().from_filename(str(path))
    return Notebook.generated(config, str(path.relative_to(root)), content=text)
