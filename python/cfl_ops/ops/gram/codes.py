"""What the info of the gram ops says."""

NOT_FINITE, BAD_CLASS, BAD_WEIGHT = -1, -2, -3
