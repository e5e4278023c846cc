"""Networks as copies that training may change, made of what the user's own would compute with."""
