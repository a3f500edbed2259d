"""Compute recurrences by pure functions: tensors and a state in, tensors and a state out."""

from lmsleep.ops.align import right_align
from lmsleep.ops.append import append
from lmsleep.ops.conv import short_conv
from lmsleep.ops.dynamic_conv import dynamic_conv
from lmsleep.ops.rules import (
    RULES,
    Backend,
    find_rule,
    gated_delta_rule,
    gated_linear_rule,
    register_rule,
    update,
)
from lmsleep.ops.rules.rule import Rule

__all__ = [
    "RULES",
    "Backend",
    "Rule",
    "append",
    "dynamic_conv",
    "find_rule",
    "gated_delta_rule",
    "gated_linear_rule",
    "register_rule",
    "right_align",
    "short_conv",
    "update",
]
