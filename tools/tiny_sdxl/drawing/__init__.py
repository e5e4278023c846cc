"""The drawings: pen, patterns, things and places."""
