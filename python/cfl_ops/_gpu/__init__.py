"""What every GPU kernel stands on: the card, its tuning rules, and the two ways to run CUDA C++."""
