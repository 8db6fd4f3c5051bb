"""Megatron-core behind narrow verbs: the only package that imports megatron or
transformer_engine."""
