"""`lmsleep demo`: what longer sleep buys."""

from lmsleep.cli.options import parse
from lmsleep.recipes import demo as demo_command


def demo(argv: list[str]) -> None:
    """Run `lmsleep demo`."""
    options = parse(demo_command.DemoOptions, argv, "lmsleep demo")
    demo_command.run(options)
