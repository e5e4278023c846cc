"""The drawings: pen, colours, patterns, objects and places."""
