"""What runs have left: their records, and these as numbers."""
