"""Hugging Face checkpoints on Megatron models: configuration, names and layouts, files."""
