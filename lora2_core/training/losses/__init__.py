"""What the losses of a run say about it: whether it goes wrong, and how strong it has to be."""
