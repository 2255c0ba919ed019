"""solve: batched ridge systems, least squares, pseudoinverses and ridge regression from data."""
