"""cholesky: factors that follow a changing matrix, and factors of matrices that are barely definite."""
