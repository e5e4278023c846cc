"""What is personalised: the demo model, or a checkpoint of the SDXL family."""
