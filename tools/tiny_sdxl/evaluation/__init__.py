"""What the trained base is worth: what its autoencoder keeps, what it paints, how fast it is."""
