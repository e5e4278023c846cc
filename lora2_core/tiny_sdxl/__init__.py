"""The embedded demo model and its judges, with their weights."""
