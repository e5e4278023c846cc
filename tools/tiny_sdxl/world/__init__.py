"""The drawn world: scenes with their captions, and subjects that the base never sees."""
