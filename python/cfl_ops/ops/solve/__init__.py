"""solve: batched ridge systems, least squares and pseudoinverses that never fail silently."""
