"""What a browser asks for: routes, events, lists, curves."""
