"""What a masked objective sees of a file and what it makes of the rest: in pictures, in motion and by ear."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmssl.contracts import Draw, Modality, Reconstruction, Reconstructs
from mmssl.data.dataset import batch_of_one
from mmssl.errors import UserError
from modalities.abilities import Moves, Sounds
from modalities.encoder import MODALITIES
from modalities.views import one_view
from tasks.build import EncoderRecipe
from tasks.panels import Block, Line, Panel, Shot, arranged
from tasks.panels_media import animate, beside, record, still
from tasks.panels_page import draw
from tasks.report import Medium, Picture, Shown, as_medium


class Attempt(NamedTuple):
    """One signal at one mask ratio."""

    ratio: float
    made: Reconstruction
    """Without the batch's axis: [C, *size]."""
    tokens: int

    @property
    def stages(self) -> list[Tensor]:
        """What is there, what is seen and what is predicted, as the tokenizer cuts it: [C, *size] each."""
        original, filled, hidden, _ = self.made
        return [original, torch.where(hidden > 0, 0.0, original), filled]

    @property
    def words(self) -> str:
        """How much was seen."""
        seen = round(self.tokens * (1 - float(self.made.hidden.mean())))
        return f"{100 * self.ratio:g} % masked\n{seen} of {self.tokens} seen"


class Attempts(NamedTuple):
    """What is shown of one file."""

    name: str
    at: Sequence[Attempt]
    """By mask ratio."""
    rate: float = 0.0
    """Frames per second, of what moves."""


def draw_at(recipe: EncoderRecipe, objective: Reconstructs, ratio: float, source: Path) -> Draw:
    """Return what the recipe's objective would draw at another mask ratio; UserError where it has none."""
    if not hasattr(recipe.objective, "mask_ratio"):
        raise UserError(f"{source}: {recipe.objective.name} has no mask ratio, at which it could be shown")
    # All that is hidden is shown, also where training predicts only a part of it.
    whole = {name: 1.0 for name in ("decode_ratio",) if hasattr(recipe.objective, name)}
    settings = recipe.objective.model_copy(update={"mask_ratio": ratio, **whole})
    with torch.device("meta"):  # only its draw is wanted, not another decoder
        draw = settings.build(objective.encoders()).draw()
    assert draw is not None
    return draw


def attempt(
    objective: Reconstructs, draw: Draw | None, ratio: float, example: Mapping[str, Tensor], rng: np.random.Generator
) -> Attempt:
    """Return what an objective makes of a file's inputs [C, *size], of several views of them of the middle one."""
    tokenizer = next(iter(objective.encoders().values())).tokenizer
    inputs = {name: one_view(signal, len(tokenizer.size)) for name, signal in example.items()}
    grid = tokenizer.grid_of(inputs["signal"].shape[1:])
    original, filled, hidden, past = objective.reconstruct(batch_of_one(inputs, draw, grid, rng))
    alone = Reconstruction(original[0], filled[0], hidden[0], None if past is None else past[0])
    return Attempt(ratio, alone, prod(grid))


def attempts(
    recipe: EncoderRecipe,
    objective: Reconstructs,
    source: Path,
    names: Sequence[str],
    examples: Sequence[Mapping[str, Tensor]],
    ratios: Sequence[float],
    seed: int,
    rates: Sequence[float] | None = None,
    places: Sequence[int] | None = None,
) -> list[Attempts]:
    """Return each file's inputs, [C, *size] each, at each mask ratio.

    The mask of a file depends on the seed and its place alone (``places``, or where it stands); what is seen at a
    higher ratio is seen at a lower one.
    """
    draws = [draw_at(recipe, objective, ratio, source) for ratio in ratios]
    found = []
    for i, (name, example) in enumerate(zip(names, examples, strict=True)):
        made = [
            attempt(objective, draw, ratio, example, np.random.default_rng([seed, places[i] if places else i]))
            for ratio, draw in zip(ratios, draws, strict=True)
        ]
        found.append(Attempts(name, made, rates[i] if rates else 0.0))
    return found


# As a panel


def reconstruction_panel(recipe: EncoderRecipe, found: Sequence[Attempts], playing: bool = False) -> Panel:
    """Return original, masked and reconstruction at each ratio, one block per file; ``playing`` adds sound and motion.

    Those are for pages.
    """
    kind = MODALITIES[recipe.modality]
    blocks = []
    for name, made, rate in found:
        shots: list[Shot] = []
        for one in made:
            original, masked, predicted, *film = triplet(recipe, one, playing, rate)
            shots = shots or [Shot(name, x) for name, x in given(recipe, one).items()] + [Shot("original", original)]
            shots += [Shot(one.words, masked), Shot("reconstruction", predicted)]
            shots += [Shot(f"original, {100 * one.ratio:g} % masked and reconstruction, in motion", x) for x in film]
        blocks.append(Block(name, [Line("", shots)]))
    words = " / ".join(f"{100 * one.ratio:g}" for one in found[0].at)
    note = f"{seen_note(recipe, 'masked pictures')}{target_note(recipe)}"
    note += sound_note(kind) if playing else ""
    return Panel(f"Reconstructions at {words} % masked", note, arranged(blocks))


def triplet(recipe: EncoderRecipe, made: Attempt, playing: bool = False, rate: float = 0.0) -> list[Shown]:
    """Return what is there, what is seen and what is predicted, and with ``playing`` all three in motion if they move.

    Of what can be heard, the first and the last then have their sounds.
    """
    kind = MODALITIES[recipe.modality]
    shown = [still(kind, x, recipe.signal) for x in made.stages]
    if playing and isinstance(kind, Sounds):
        for i, sound in zip((0, 2), audible(kind, recipe, made, "FLAC"), strict=True):
            shown[i] = replace(as_medium(shown[i]), sound=sound)
    if playing and isinstance(kind, Moves):
        frames = beside([kind.motion(x, recipe.signal) for x in made.stages])
        shown.append(Medium(frames[0], film=animate(list(frames), rate, "WEBP")))
    return shown


def given(recipe: EncoderRecipe, made: Attempt) -> dict[str, Shown]:
    """Return what was seen besides, by its name: the past look of a pair."""
    past = made.made.past
    return {} if past is None else {past_word(recipe): still(MODALITIES[recipe.modality], past, recipe.signal)}


def past_word(recipe: EncoderRecipe) -> str:
    """Return what the look is called from which the other one is predicted."""
    return str(getattr(getattr(recipe.signal, "look", None), "past", "past"))


def seen_note(recipe: EncoderRecipe, masked: str) -> str:
    """Return what a reconstruction was made from, where the masked pictures are called ``masked``."""
    paired = "past" in MODALITIES[recipe.modality].inputs(recipe.signal)
    also = f", and those called {past_word(recipe)}," if paired else ""
    return f"{recipe.objective.title} saw only what the {masked}{also} show."


def target_note(recipe: EncoderRecipe) -> str:
    """Return what must be said of reconstructions that use the true patches' statistics; nothing where they do not."""
    target = getattr(recipe.model.tokenizer, "target", "raw")
    if target == "raw":
        return ""
    which = "each colour in each hidden patch" if target == "normalized_per_channel" else "each hidden patch"
    return (
        f" Predictions are of normalised patches: the brightness and contrast of {which} are those of the "
        "true one, only its content is predicted."
    )


def sound_note(kind: Modality) -> str:
    """Return what must be said of what is heard; nothing where there is nothing to hear."""
    if not isinstance(kind, Sounds):
        return ""
    return (
        " Sounds are made from the spectrograms, that of the original too: a spectrogram has no phases, and those "
        "that are heard are estimated (Griffin-Lim)."
    )


# In motion and by ear


def reconstruction_film(recipe: EncoderRecipe, found: Sequence[Attempts], out: Path) -> tuple[list[Picture], float]:
    """Return pages with the original, the masked and the reconstructed frame of each file and ratio, and their rate.

    Raises UserError for files of different rates: one animation has one.
    """
    kind = MODALITIES[recipe.modality]
    assert isinstance(kind, Moves)
    rate = found[0].rate
    for other in found:
        if abs(other.rate - rate) > 0.01 * rate:
            raise UserError(
                f"{out}: {found[0].name} and {other.name} have {rate:.4g} and {other.rate:.4g} frames per second; "
                "give one file, or an .html page"
            )
    panel = reconstruction_panel(recipe, found)
    moving = [
        [(one, [kind.motion(x, recipe.signal) for x in one.stages]) for one in file.at] for file in found
    ]  # original, masked and reconstructed frames, by file and ratio
    pages = []
    for i in range(len(moving[0][0][1][0])):
        blocks = [
            Block(file.name, [_moment(one, [frames[i] for frames in stages]) for one, stages in lines])
            for file, lines in zip(found, moving, strict=True)
        ]
        pages.append(draw(replace(panel, blocks=blocks)))
    return pages, rate


def _moment(made: Attempt, frames: Sequence[Picture]) -> Line:
    words = "original", made.words.split("\n")[0], "reconstruction"
    return Line("", [Shot(caption, frame) for caption, frame in zip(words, frames, strict=True)])


def audible(kind: Sounds, recipe: EncoderRecipe, made: Attempt, form: str) -> list[bytes]:
    """Return the original and the reconstruction as files, "FLAC" or "WAV", both through Griffin-Lim."""
    original, _, predicted = made.stages
    (first, rate), (second, _) = (kind.sound(x, recipe.signal) for x in (original, predicted))
    return record([first, second], rate, form)
