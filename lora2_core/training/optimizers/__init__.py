"""What moves A and B: optimizers by name, and what they remember."""
