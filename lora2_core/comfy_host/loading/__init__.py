"""LoRAs on the user's models: whether they fit, as patches of weights or beside the layers."""
