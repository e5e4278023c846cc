"""Pictures, tables, scores."""
