"""What the info of the cholesky ops says, and their limits."""

BAD_V, BAD_L = -1, -2
"""Of cholesky_update: a positive info is the order of the first pivot that breaks down."""
NOT_FINITE, INDEFINITE = -1, 1
"""Of safe_cholesky; the first of recursive_ridge_, too."""
UNKNOWN_ROWS, BAD_WEIGHT, BAD_STATE, TOO_LARGE = 1, 2, 3, 4
"""Of recursive_ridge_."""
LOSSY = 5
"""Of RecursiveRidge.remove, besides."""
BREAKDOWN_EPS = 10
"""A downdate breaks down where it leaves less than this many eps of a squared pivot: what is left is rounding."""
