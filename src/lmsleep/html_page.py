"""The frame of self-contained HTML pages: no network, no scripts."""

FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; color: #222 }}
img {{ width: 100% }}
table {{ border-collapse: collapse; font-size: 14px; display: block; overflow-x: auto }}
td, th {{ padding: .25em .8em; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap }}
</style></head><body>
{body}
</body></html>
"""


def framed(title: str, body: str) -> str:
    """Make a page of `title` and `body`, which are HTML already: the caller escapes the texts in them."""
    return FRAME.format(title=title, body=body)
