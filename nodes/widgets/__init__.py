"""The widgets that several nodes share, or that fill a node's file."""
