"""Weights to few bits: one method a file."""
