"""Recurrences as pure functions: tensors and a state in, tensors and a state out."""

from lmsleep.ops.align import right_align
from lmsleep.ops.conv import short_conv
from lmsleep.ops.rules import RULES, Backend, gated_delta_rule, gated_linear_rule

__all__ = ["RULES", "Backend", "gated_delta_rule", "gated_linear_rule", "right_align", "short_conv"]
