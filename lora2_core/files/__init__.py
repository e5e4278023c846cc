"""One LoRA file: names, header, shapes, metadata, reading, writing."""
