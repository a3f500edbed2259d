"""The demo: what longer sleep buys, shown on a laptop."""
