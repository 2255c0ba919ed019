"""What the info of proximal_step says."""

BAD_FEATURES, BAD_TARGET, BAD_WEIGHT, BAD_PENALTY, BAD_SAMPLE_WEIGHT = -1, -2, -3, -4, -5
"""A positive info is the order of the first leading minor of the system that is not positive definite."""
