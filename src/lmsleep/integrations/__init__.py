"""What lmsleep plugs into: the evaluation harness lm-eval."""
