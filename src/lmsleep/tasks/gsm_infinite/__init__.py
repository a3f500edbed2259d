"""GSM-Infinite, written anew: word problems of any number of operations in contexts of any length.

structure  places, things, parameters
graph      which parameter is computed from which
meaning    constants, values, what an answer depends on
thinning   how often which hard problem is kept
templates  names and turns of phrase          language  the same as tokens
no_chain   what is reached without following a statement to another
noise      statements that change nothing
reader     solves a problem from its text
task       options and batches
"""

from lmsleep.tasks.gsm_infinite.task import GSMInfinite

__all__ = ["GSMInfinite"]
