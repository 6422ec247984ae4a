"""Losses: pure functions of tensors, in fp32, reduced per sample first and then over the batch."""
