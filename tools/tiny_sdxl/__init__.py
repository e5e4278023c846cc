"""A tiny SDXL that is trained from scratch on drawn scenes, for demo, tests and benchmarks."""
