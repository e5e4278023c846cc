"""Training, painting and judging: each piece of work once, whoever does it."""
