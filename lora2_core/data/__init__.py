"""From photos to samples."""
