"""The parts of bench/gpu.py: what is measured (plan), whom (contestants), and how (meters)."""
