"""What each rank of ``test_clip_rows`` runs: ``python clip_repeated.py FOLDER``, in a launcher's environment.

Rank r writes FOLDER/rank-r.safetensors: loss, metrics and gradients, averaged over the ranks as engines do.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from clip_ranks import draw, gradients, make, share, with_missing
from safetensors.torch import save_file

from mmssl.distributed import world

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


if __name__ == "__main__":
    torch.set_num_threads(1)
    me = world()
    dist.init_process_group("gloo")
    results = walk(share(repeated(), me.rank, me.size))
    for value in results.values():
        dist.all_reduce(value)
        value /= me.size
    save_file(results, Path(sys.argv[1]) / f"rank-{me.rank}.safetensors")
    dist.destroy_process_group()
