"""Whom a base is to learn, and the prompts to paint them by."""
