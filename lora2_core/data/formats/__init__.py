"""The formats of pictures: their limits, and what is looked at before a decoder is."""
