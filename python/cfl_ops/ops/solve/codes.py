"""What the info of the solve ops says, and their limits."""

BAD_PENALTY = -1
"""A negative info; a positive one is the order of the first leading minor that breaks down."""
DOUBT = 4.0
"""A float32 pivot below this many times n eps is not trusted (kDoubt of csrc/cpu/solve.cpp)."""
