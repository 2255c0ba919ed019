"""The op families: one folder a family, one file an op."""
