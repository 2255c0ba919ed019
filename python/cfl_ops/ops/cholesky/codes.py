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
LEAST_EIGENVALUE = 10
"""Of safe_cholesky, of the matrix of unit diagonal, in eps sqrt(D). Factor and inverse are off by about
eps sqrt(D) / 2 over the least eigenvalue (measured to D = 300), so by a twentieth, or a tenth at the most."""
FIRST_JITTER = 16
"""Likewise: what is added first is more than the least eigenvalue that is asked for."""
MOST_ROUNDING = 1024
"""In eps D: sums of 10^6 products that are off by sqrt(10^6) eps each make an eigenvalue at most so negative."""
