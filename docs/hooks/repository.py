"""The pages of the site: those of the repository in their places, notebooks, and the API reference."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbconvert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

SHOWN = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "LICENSE"),
    *("docs/*.md", "docs/images/*", "results/*/README.md", "results/*/figure.png"),
    "src/lmsleep/pretrained/README.md",
)


class Notebook(File):
    """A page whose links are those to the notebook itself, so that they hold in a checkout too."""

    def is_documentation_page(self) -> bool:
        """It is a page though it ends in .ipynb."""
        return True


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """All files of the site, by their paths in the repository; of what mkdocs found, those of the theme."""
    root = Path(config.config_file_path).parent
    themes = [file for file in files if file.src_dir != config.docs_dir]
    shown = [path for pattern in SHOWN for path in root.glob(pattern)]
    return Files(
        [
            *themes,
            *(File.generated(config, str(p.relative_to(root)), abs_src_path=str(p)) for p in shown),
            *(_notebook(config, p, root) for p in (root / "docs/notebooks").glob("*.ipynb")),
            *(_reference(config, entry) for entry in _entries(config.nav) if entry.startswith("api/")),
        ]
    )


def _notebook(config: MkDocsConfig, path: Path, root: Path) -> File:
    text, _ = nbconvert.MarkdownExporter().from_filename(str(path))
    return Notebook.generated(config, str(path.relative_to(root)), content=text)


def _reference(config: MkDocsConfig, entry: str) -> File:
    module = Path(entry).stem
    return File.generated(config, entry, content=f"::: {module}\n")


def _entries(nav: Any) -> Iterator[str]:
    """The pages that the navigation names."""
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from _entries(part)
