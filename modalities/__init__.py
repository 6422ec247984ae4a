"""Modalities: files into tensors, tensors into tokens. One file each."""
