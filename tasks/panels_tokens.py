"""What an encoder's tokens know: where the heads of the last block look, and the principal components as colours.

Shape legend: B samples, N tokens, D width, H heads.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from matplotlib import colormaps
from torch import Tensor

from mmssl.backbones.inspect import attention_maps, heaviest, inputs_of, jaccard
from mmssl.backbones.vit import ViT
from mmssl.contracts import Grid
from mmssl.errors import UnusableData, UserError
from modalities.encoder import Encoder
from tasks.panels import Block, Line, Panel, Shot, arranged
from tasks.panels_media import View, view_of
from tasks.report import Picture

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Bools: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]


def _finite(values: Tensor, name: str) -> Tensor:
    if not bool(values.isfinite().all()):
        raise UnusableData(f"{name}: its features are NaN or infinite")
    return values


# Attention


def attention_to_patches(encoder: Encoder, signal: Tensor) -> tuple[Tensor, Grid]:
    """Return the last block's attention to each patch of a signal [C, *size]: float32 [H, N], and the patches' grid.

    It is the class token's, or without one the mean over the queries of all patches. Raises UserError for an encoder
    that is no ViT.
    """
    if not isinstance(encoder.backbone, ViT):
        raise UserError("attention can be shown of a ViT alone; give --panel pca")
    with inputs_of(encoder.backbone) as seen:
        _, grid = encoder.tokens([signal])
    maps = attention_maps(encoder.backbone, seen[0])[0]
    looks = maps[:, 0] if encoder.num_prefix else maps.mean(1)
    return looks[:, encoder.num_prefix :].cpu(), grid


def attention_panel(
    encoder: Encoder, names: Sequence[str], signals: Sequence[Tensor], mass: float, truths: Sequence[Bools] = ()
) -> tuple[Panel, dict[str, Any]]:
    """Return each head's attention and the patches that hold the share ``mass`` of it, one block per signal, and facts.

    ``truths``, if given, are what is to be found in each signal's picture, bool [h, w]: every head's patches are then
    measured by their Jaccard index with it, pixel by pixel, as DINO's attention was (arXiv:2104.14294, table 5 and
    appendix).
    """
    whose = "the class token" if encoder.num_prefix else "all tokens on average (there is no class token)"
    share = f"{100 * mass:g} %"
    blocks, indices = [], []
    for i, (name, signal) in enumerate(zip(names, signals, strict=True)):
        weights = _finite(attention_to_patches(encoder, signal)[0], name)
        view = view_of(encoder, signal)
        heat: list[Shot | None] = [Shot("input", view.shown())]
        kept: list[Shot | None] = [Shot("mask", view.shown(_lit(view, truths[i])))] if truths else [None]
        found = []
        for head, (row, mask) in enumerate(zip(weights, heaviest(weights, mass), strict=True), start=1):
            heat.append(Shot(f"head {head}", view.shown(_heat(view, row.numpy()))))
            where = view.spread(mask.numpy())
            words = f"{int(mask.sum())} of {len(mask)}"
            if truths:
                found.append(float(jaccard(torch.from_numpy(where.ravel()), torch.from_numpy(truths[i].ravel()))))
                words += f"\nJaccard {found[-1]:.2f}"
            kept.append(Shot(words, view.shown(_lit(view, where))))
        indices.append(found)
        lines = [Line("attention", heat), Line(f"patches with {share} of it", kept)]
        blocks.append(Block(name, lines))
    note = (
        f"Attention of {whose}. Each map goes from 0 (dark) to its head's largest weight (bright). Lit below: the "
        f"fewest patches that together hold {share} of the head's attention to patches."
    )
    facts: dict[str, Any] = {"mass": mass}
    if truths:
        facts |= {"jaccard": dict(zip(names, indices, strict=True)), "best": float(np.mean([*map(max, indices)]))}
        note += f" The Jaccard index of a picture's best head with its mask is {facts['best']:.3f} on average."
    return Panel("Attention of the last block, by head", note, arranged(blocks)), facts


def _lit(view: View, where: Bools) -> Picture:
    return np.where(where[..., None], view.picture, view.picture // 5)


def _heat(view: View, weights: np.ndarray[Any, Any]) -> Picture:
    return view.spread(colormaps["inferno"](weights / max(float(weights.max()), 1e-30), bytes=True)[:, :3])


# Principal components


def pca_panel(
    encoder: Encoder, names: Sequence[str], signals: Sequence[Tensor], foreground: bool
) -> tuple[Panel, dict[str, Any]]:
    """Return the patch tokens of each signal with their first 3 principal components as red, green and blue, and facts.

    One basis serves all signals, and their order means nothing.
    """
    tokens, grids = [], []
    for name, signal in zip(names, signals, strict=True):
        part, grid = encoder.tokens([signal])
        tokens.append(_finite(part[0], name).double().numpy())
        grids.append(grid)
    # Sums in an order of their own, so that the order of the files does not change the last bit.
    order = sorted(range(len(tokens)), key=lambda i: tokens[i].tobytes())
    joint = np.concatenate([tokens[i] for i in order])
    border = np.concatenate([_border(grids[i], encoder.tokenizer.extend) for i in order])
    shown = _foreground(joint, border) if foreground else np.ones(len(joint), dtype=bool)
    colours, shares = component_colours(joint, shown)
    ends = np.cumsum([len(tokens[i]) for i in order])
    parts = dict(zip(order, np.split(colours, ends[:-1]), strict=True))
    sides = dict(zip(order, map(_one_side, np.split(shown, ends[:-1])), strict=True)) if foreground else {}
    blocks = []
    for i, (name, signal) in enumerate(zip(names, signals, strict=True)):
        view = view_of(encoder, signal)
        side = f"\nall {sides[i]}" if sides.get(i) else ""
        shots = [
            Shot("input", view.shown()),
            Shot(f"components 1-3{side}", view.shown(view.spread(parts[i]))),
        ]
        blocks.append(Block(name, [Line("", shots)]))
    facts: dict[str, Any] = {"explained": shares.tolist()}
    note = f"One basis for all files: equal colours mean alike tokens. {_explained(shares)}"
    if foreground:
        facts["foreground"] = float(shown.mean())
        note += (
            f" Black: background, the side of the first component that is commoner along the border "
            f"({100 * (1 - shown.mean()):.0f} % of the patches); the components are of the rest alone."
        ) + _undivided([name for name in sides.values() if name], len(signals))
    return Panel("Principal components of the patch tokens", note, arranged(blocks)), facts


def _one_side(shown: Bools) -> str:
    """Return what all patches of one file are, shown [N] or not; "" for a file with both."""
    return "foreground" if shown.all() else "" if shown.any() else "background"


def _undivided(sides: Sequence[str], files: int) -> str:
    """Return a warning of files whose patches all lie on one side of the first component; nothing for none."""
    if not sides:
        return ""
    counts = " and ".join(f"{n} all {side}" for side, n in sorted(Counter(sides).items()))
    return (
        f" Of {files} files, {counts}: the first component divides the files rather than what is in them from what is "
        "behind; try more or other files."
    )


def _explained(shares: Floats) -> str:
    parts = ", ".join(f"{100 * share:.0f}" for share in shares)
    return (
        f"Red, green and blue hold {parts} % of the variance. Signs: each component's largest weight is positive. "
        "Each colour runs from its 1st to its 99th percentile over all files."
    )


def component_colours(tokens: Floats, shown: Bools) -> tuple[Picture, Floats]:
    """Return the colours uint8 [N, 3] of tokens [N, D], black where not ``shown`` [N], and the 3 shares of variance."""
    values, shares = principal(tokens[shown])
    low, high = np.percentile(values, [1, 99], axis=0)
    range_ = np.where(high > low, high - low, 1.0)
    scaled = np.where(high > low, (values - low) / range_, 0.5)
    colours = np.zeros((len(tokens), 3), dtype=np.uint8)
    colours[shown] = np.rint(255 * scaled.clip(0, 1)).astype(np.uint8)
    return colours, shares


def principal(tokens: Floats, count: int = 3) -> tuple[Floats, Floats]:
    """Return the first principal components of tokens [N, D] -> [N, count], and their shares of the variance [count].

    The weight of largest magnitude in each component (the first of equal ones) is positive. Components beyond the
    tokens' rank are zero.
    """
    centred = tokens - tokens.mean(0)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    variances, axes = variances[::-1][:count].clip(0), axes[:, ::-1][:, :count]
    total = float((centred**2).sum())
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    axes = axes * (variances > 1e-12 * total)  # what is left of a rank that is not there is rounding
    values = np.zeros((len(tokens), count))
    values[:, : axes.shape[1]] = centred @ axes
    shares = np.zeros(count)
    shares[: len(variances)] = variances / max(total, 1e-300)
    return values, shares


def _border(grid: Grid, extend: tuple[int, ...]) -> Bools:
    inside = np.zeros(grid, dtype=bool)
    # Time has no border: what is there at the beginning and the end need not lie behind the rest.
    inside[tuple(slice(None) if axis in extend else slice(1, -1) for axis in range(len(grid)))] = True
    return ~inside.ravel()


def _foreground(tokens: Floats, border: Bools) -> Bools:
    """Mark the tokens of the things: one side of the first component, cut where the two sides differ most."""
    first = principal(tokens, 1)[0][:, 0]
    high = first > split(first)
    if high.all() or not high.any():
        return np.ones(len(first), dtype=bool)
    # Which side is positive means nothing; a background, unlike a thing, reaches the pictures' border.
    return high if border[high].mean() <= border[~high].mean() else ~high


def split(values: Floats) -> float:
    """Return the value [N] -> () above which two groups begin, where the variance between them is largest.

    (Otsu, IEEE Transactions on Systems, Man and Cybernetics 9, 1979, eq. 18.)
    """
    ordered = np.sort(values)
    count, total = len(ordered), ordered.sum()
    below = np.arange(1, count)
    sums = ordered.cumsum()[:-1]
    means = sums / below - (total - sums) / (count - below)
    between = below * (count - below) * means**2
    return float(ordered[int(between.argmax())]) if count > 1 else float(values[0])
