"""proximal: closed-form proximal steps of a last layer."""
