"""The twelve objects, drawn."""
