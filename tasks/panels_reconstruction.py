"""What a masked objective sees of a file and what it makes of the rest, in pictures."""

from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmssl.contracts import Draw, Reconstructs
from mmssl.errors import UserError
from tasks.build import Recipe
from tasks.panels import Block, Line, Panel, Shot
from tasks.run_report import target_note, triplet


def draw_at(recipe: Recipe, objective: Reconstructs, ratio: float, source: Path) -> Draw:
    """Return what the recipe's objective would draw at another mask ratio; UserError where it has none."""
    if not hasattr(recipe.objective, "mask_ratio"):
        raise UserError(f"{source}: {recipe.objective.name} has no mask ratio, at which it could be shown")
    settings = recipe.objective.model_copy(update={"mask_ratio": ratio})
    with torch.device("meta"):  # only its draw is wanted, not another decoder
        draw = settings.build(objective.encoders()).draw()
    assert draw is not None
    return draw


def reconstruction_panel(
    recipe: Recipe,
    objective: Reconstructs,
    source: Path,
    names: Sequence[str],
    signals: Sequence[Tensor],
    ratios: Sequence[float],
    seed: int,
) -> Panel:
    """Return original, masked and reconstruction at each ratio, one block per signal [C, *size].

    The mask of a file depends on the seed and its place alone; what is seen at a higher ratio is seen at a lower one.
    """
    draws = [draw_at(recipe, objective, ratio, source) for ratio in ratios]
    tokenizer = next(iter(objective.encoders().values())).tokenizer
    blocks = []
    for i, (name, signal) in enumerate(zip(names, signals, strict=True)):
        tokens = prod(tokenizer.grid_of(signal.shape[1:]))
        shots: list[Shot] = []
        for ratio, draw in zip(ratios, draws, strict=True):
            rng = np.random.default_rng([seed, i])
            (original, masked, predicted), hidden = triplet(recipe, objective, draw, signal, rng)
            seen = round(tokens * (1 - hidden))
            shots = shots or [Shot("original", original)]
            shots.append(Shot(f"{100 * ratio:g} % masked\n{seen} of {tokens} seen", masked))
            shots.append(Shot("reconstruction", predicted))
        blocks.append(Block(name, [Line("", shots)]))
    words = " / ".join(f"{100 * ratio:g}" for ratio in ratios)
    note = f"{recipe.objective.name.upper()} saw only what the masked pictures show.{target_note(recipe)}"
    return Panel(f"Reconstructions at {words} % masked", note, blocks)
