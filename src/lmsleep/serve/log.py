"""The log: a JSON object a line on standard error, for programs that collect lines."""

import json
import logging
import sys
from datetime import UTC, datetime

LOG = logging.getLogger("lmsleep.serve")
FIELDS = "fields"  # of a record: what stands in its line beside time, level and message


class Lines(logging.Formatter):
    """Writes a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; a traceback is a text in it."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        said = {"time": when, "level": record.levelname.lower(), "message": record.getMessage()}
        said |= getattr(record, FIELDS, {})
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said)


def to_stderr() -> None:
    """Send what the server and uvicorn have to say to standard error, as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    for logger, level in ((LOG, logging.INFO), (logging.getLogger("uvicorn"), logging.WARNING)):
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
