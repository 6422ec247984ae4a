"""Heads: what is put on an encoder to train or use it, and mostly thrown away afterwards."""
