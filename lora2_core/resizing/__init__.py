"""Fewer ranks, sums of LoRAs, a size in megabytes."""
