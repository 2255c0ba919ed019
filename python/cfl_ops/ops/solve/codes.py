"""What the info of the solve ops says, and their limits."""

BAD_PENALTY = -1
"""A negative info of ridge_solve; a positive one is the order of a leading minor that breaks down."""
BAD_CLASS = -2
"""class_solve: a class index is out of range."""
NOT_FINITE = 1
"""lstsq and pinv: the matrix has NaN or Inf."""
BAD_TOLERANCE = -1
"""lstsq and pinv: rtol or atol is negative, NaN or Inf."""
UNRESOLVED = 2
"""lstsq and pinv, while a CUDA graph is captured: the matrix needs the path that synchronises."""
PIVOT = 4.0
"""A pivot below this many times eps and its diagonal entry is a rounding error. Here and below: csrc has the same."""
PROVEN = 0.025
"""A factor proves its solutions if sqrt(n) eps times the inverse's norm and the ratio of scales is up to this."""
AGAIN = 1e-5
"""Of PROVEN, where float32 systems are solved in float64: what is right there to float32."""
CORRECTIONS = 3
PROBES = 4
CONTRACTION = 0.25
"""The largest share of an error that a correction may leave."""
ERROR = 0.02
"""The largest error of a solution, as its corrections tell it."""
RESIDUAL = 2.0**-30
"""Of eps times a solution: more than the error of a residual in twice the precision."""
