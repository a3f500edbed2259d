"""What a model is worth: its score on a task, recalled facts, bits around each sleep, and what it costs."""

from lmsleep.evaluation.intervals import mean_interval, wilson
from lmsleep.evaluation.score import EVAL_SEED, Score, evaluate

__all__ = ["EVAL_SEED", "Score", "evaluate", "mean_interval", "wilson"]
