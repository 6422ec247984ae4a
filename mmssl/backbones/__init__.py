"""Backbones: tokens in, representations out. They know no modality and no mask."""
