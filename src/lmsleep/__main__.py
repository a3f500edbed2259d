"""`python -m lmsleep`."""

from lmsleep.cli import main

main()
