"""Measurements of speed; the figures in the documentation come from here."""
