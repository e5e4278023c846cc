"""Files as others left them: opened without waiting, read without trusting that they stay."""
