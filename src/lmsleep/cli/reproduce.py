"""`lmsleep reproduce`: the runs behind a figure."""

from lmsleep.cli.options import parse
from lmsleep.recipes import GROUPS, RECIPES
from lmsleep.recipes import run as reproduce_command


def reproduce(argv: list[str]) -> None:
    """Run `lmsleep reproduce FIGURE`."""
    cls = reproduce_command.ReproduceOptions
    options = parse(cls, argv, "lmsleep reproduce", f"{cls.__doc__}\n\nFigures:\n{_figures()}")
    reproduce_command.run(options)


def _figures() -> str:
    groups = {name: f"All of {', '.join(names)}" for name, names in GROUPS.items()}
    titles = {name: recipe.title for name, recipe in RECIPES.items()} | groups
    return "\n".join(f"  {name:<20} {title}" for name, title in titles.items())
