"""Pruning: smaller checkpoints from larger ones, read through the same door."""
