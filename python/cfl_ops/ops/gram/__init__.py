"""gram: the moments of features and targets that every closed-form learner starts from."""
