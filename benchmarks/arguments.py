"""How the commands of the benchmarks read what they are given."""

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says in one line what does not fit."""

    def error(self, message: str) -> NoReturn:
        """Leave with 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (see --help)\n")
