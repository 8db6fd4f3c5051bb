"""Megatron-core behind narrow verbs: the only package that imports megatron or
transformer_engine."""

from peergrad.parallel import engine

engine.try_before_megatron()
