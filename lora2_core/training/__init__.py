"""The loop, its losses, optimizers, rank control, memory."""
