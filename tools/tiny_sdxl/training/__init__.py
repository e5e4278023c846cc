"""From drawn scenes to weights: the autoencoder, latents through it, the base, and the judges."""
