"""The core of LoRA²: adaptive-rank adapters, their training, and their files.

Only :mod:`.comfy_host` knows ComfyUI; every other module needs nothing but torch,
numpy, Pillow and safetensors.
"""
