"""A run in its thread, the queue, and what outlives the process."""
