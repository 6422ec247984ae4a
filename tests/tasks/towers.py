"""What the tests of joint spaces share: run folders of towers that were never trained, and pairs to compare with."""

import csv

import torch

from mmssl.run import Run
from tasks.build import build_objective, parse_recipe
from tasks.writer import export

BACKBONE = {"dim": 16, "depth": 1, "num_heads": 2}
TOWERS = {
    "image": {"signal": {"size": [16, 16]}, "model": {"tokenizer": {"patch_size": [8, 8]}, "backbone": BACKBONE}},
    "text": {
        "signal": {"sentences": 2, "length": 64},
        "model": {"tokenizer": {"name": "sentences"}, "backbone": BACKBONE},
    },
    "words": {
        "signal": {"context": 16},
        "model": {
            "tokenizer": {"name": "bpe", "vocab_size": 520, "merges": "r e\nre d</w>"},
            "backbone": {**BACKBONE, "name": "causal", "rotary": False, "memory": None},
            "cls_token": False,
            "pool": "last",
        },
    },
    "audio": {
        "signal": {"sample_rate": 8000, "seconds": 0.32, "mels": 32, "fill": "pad"},
        "model": {"tokenizer": {"patch_size": [8, 8]}, "backbone": BACKBONE},
    },
    "video": {
        "signal": {"frames": 4, "size": [16, 16], "stride": 2},
        "model": {"tokenizer": {"patch_size": [2, 8, 8]}, "backbone": BACKBONE, "cls_token": False},
    },
}


def untrained(folder, *names, seed=0, **objective):
    """Write a run of the towers called so; keywords are settings of the objective.

    "words" is a tower of text that reads tokens.
    """
    run = Run(folder)
    run.path.mkdir(parents=True)
    recipe = parse_recipe(
        {
            "towers": {"text" if name == "words" else name: TOWERS[name] for name in names},
            "objective": {"name": "clip", "dim": 8, **objective},
            "train": {"steps": 1, "batch_size": 2, "seed": seed},
        },
        "test",
    )
    made = build_objective(recipe)
    # Vectors of random weights lie close together: pull them apart by what they have not in common.
    with torch.no_grad():
        for projection in made.projections.values():
            projection.weight -= projection.weight.mean(1, keepdim=True)
    run.config_file.write_text(recipe.as_yaml())
    state = made.state_dict()
    export(run, recipe, made, state, state)
    return run.path


def write_rows(path, rows):
    """Write a manifest of dictionaries."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
