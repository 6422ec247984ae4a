"""What each rank of ``test_clip_rows`` runs: loss, metrics and gradients, averaged over the ranks as engines do."""

import torch.distributed as dist
from clip_ranks import draw, gradients, make, share, with_missing

THREE = ("image", "text", "audio")
ROWS = [0, 1, 2, 1, 4, 0]
"""Which rows a batch has: one is twice on a rank, and one on two."""
LOSSES = ("softmax", "sigmoid")


def repeated():
    """Return a batch of these rows, each time with another look at their pictures."""
    batch = with_missing(draw(*THREE))
    picked = {key: value[ROWS] for key, value in batch.items()}
    return picked | {"image.signal": batch["image.signal"], "seed": batch["seed"]}


def walk(batch):
    """Return for each loss what there is of a batch."""
    return {
        f"{loss}/{name}": value for loss in LOSSES for name, value in gradients(make(*THREE, loss=loss), batch).items()
    }


def walk_on_ranks(rank, size):
    """Return the same of a rank's share of the batch."""
    results = walk(share(repeated(), rank, size))
    for value in results.values():
        dist.all_reduce(value)
        value /= size
    return results
