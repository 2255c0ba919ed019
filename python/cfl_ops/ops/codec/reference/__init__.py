"""The format in plain torch: what the kernels are tested against, and what serves where there are none."""
