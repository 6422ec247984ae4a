"""A tiny film whose every mask is known, for tests of what follows masks."""

import numpy as np

SIZE = 48, 64


def texture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def moving_square(count=8, step=4, side=16):
    """A textured square goes right over a smooth background, ``step`` pixels per frame."""
    rows = np.mgrid[: SIZE[0], : SIZE[1]][0]
    background = np.stack([60 + rows, 90 + rows, 120 + rows], axis=-1).astype(np.uint8)
    frames, masks = np.tile(background, (count, 1, 1, 1)), np.zeros((count, *SIZE), np.uint8)
    for t in range(count):
        place = np.s_[t, 16 : 16 + side, 8 + step * t : 8 + step * t + side]
        frames[place], masks[place] = texture(side, side), 1
    return frames, masks
