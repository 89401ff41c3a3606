"""Times and memory of `score_topk`: correct first, then timed, beside a peer on the same operands."""
