"""What the info of proximal_step says, and its options as the ops take them."""

BAD_FEATURES, BAD_TARGET, BAD_WEIGHT, BAD_PENALTY, BAD_SAMPLE_WEIGHT = -1, -2, -3, -4, -5
"""A positive info is the order of the first leading minor of the system that is not positive definite."""

# Strings would cost 160 bytes a call: torch's stable ABI does not give them back. The numbers are those of
# csrc/cpu/proximal.cpp.
MEAN, SUM = 0, 1
REDUCTIONS = {"mean": MEAN, "sum": SUM}
PENALIZED, FREE = 0, 1
BIAS_FITS = {"penalized": PENALIZED, "free": FREE}
AUTO, CHOLESKY, CG = 0, 1, 2
METHODS = {"auto": AUTO, "cholesky": CHOLESKY, "cg": CG}
