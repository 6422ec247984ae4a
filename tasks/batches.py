"""From a recipe and a path to batches: which files are trained on, what reads them, in which order."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmssl.contracts import Tokenizer, Views
from mmssl.data.blocks import blocks_of
from mmssl.data.dataset import Bucket, Plan, Samples, Stream, loader, worker_count
from mmssl.data.fragment import file_of
from mmssl.data.guard import BrokenFile
from mmssl.data.listing import Listing, list_files
from mmssl.data.pairs import list_pairs
from mmssl.data.parts import part
from mmssl.distributed import World
from mmssl.errors import UnusableData
from modalities.encoder import MODALITIES
from modalities.towers import TowerViews, blank
from tasks.build import Recipe, TowersRecipe, as_objective, sizes_of
from tasks.writer import say


def training_files(recipe: Recipe, data: str | Path, split: str | None) -> Listing:
    """Return the files to pre-train on: those of ``split``, or of the split ``train`` where the data has splits."""
    kinds = [MODALITIES[name].source(config.signal) for name, config in recipe.encoders.items()]
    if isinstance(recipe, TowersRecipe):
        return list_pairs(data, kinds, split=split, default_split="train")
    return list_files(data, kinds[0], split=split, default_split="train")


def say_films(recipe: Recipe, listing: Listing) -> None:
    """Tell a person how many folders of pictures are taken as a video each; photographs that are none do not say so."""
    for name, config in recipe.encoders.items():
        kind = MODALITIES[name].source(config.signal)
        paths = [path for path in listing.media.get(name, listing.paths) if path is not None]
        files = [file for path in paths if part(file := file_of(path)) is None]
        films = sum(Path(file).suffix.lower() not in kind.suffixes for file in files)
        if kind.frame_suffixes and films:
            what = "is a folder" if films == 1 else "are folders"
            say(f"{films} of {len(paths)} files {what} of numbered pictures, taken as one video each")


def make_batches(
    recipe: Recipe, listing: Listing, objective: nn.Module, targets: np.ndarray[Any, Any] | None, me: World, start: int,
    device: torch.device, synthetic: bool = False,
) -> Any:  # fmt: skip
    """Return this rank's micro-batches from step ``start`` to the end.

    ``synthetic``: the listing is of texts, of which every modality makes what its files would give.
    """
    length, data, root = recipe.train, recipe.data, as_objective(objective)
    buckets = make_buckets(recipe, listing, next(iter(root.encoders().values())).tokenizer, synthetic)
    items = list(zip(*listing.media.values(), strict=True)) if listing.media else listing.paths
    timeout = None if listing.media else data.timeout  # views of rows have it for each file
    views = make_views(recipe, listing, synthetic)
    samples = Samples(items, views, buckets, root.draw(), length.seed, timeout, targets)
    plan = make_plan(recipe, buckets, me, start, recipe.steps(len(listing)))
    return loader(samples, plan, worker_count(data.workers, me), pin=device.type == "cuda")


def make_plan(recipe: Recipe, buckets: Sequence[Bucket], me: World, start: int, stop: int) -> Plan:
    """Return which samples a rank reads from step ``start`` to ``stop``."""
    length, repeats = recipe.train, recipe.data.repeats
    streams = [Stream(one.members, length.seed, b, repeats, one.blocks) for b, one in enumerate(buckets)]
    return Plan(streams, length.batch_size, length.accumulate, me, start, stop)


def make_views(recipe: Recipe, listing: Listing, synthetic: bool = False) -> Views:
    """Return what reads an item of the listing: a file, or a row of them.

    Raises UnusableData where a modality that is missing in some rows cannot be read in any of the others.
    """
    kinds = {name: (MODALITIES[name], one.signal, one.model.tokenizer) for name, one in recipe.encoders.items()}
    views = {
        name: kind.synthetic(signal, tokenizer) if synthetic else kind.views(signal, tokenizer)
        for name, (kind, signal, tokenizer) in kinds.items()
    }
    if not isinstance(recipe, TowersRecipe):
        return next(iter(views.values()))
    sizes = {name: kind.sizes(signal, tokenizer)[0] for name, (kind, signal, tokenizer) in kinds.items()}
    blanks, timeout = {}, recipe.data.timeout
    for name in views:
        if None in listing.media[name]:
            try:
                blanks[name] = blank(views[name], listing.media[name], sizes[name], timeout)
            except BrokenFile as error:
                raise UnusableData(f"{listing.root}: no {name} can be read ({error.reason})") from None
    return TowerViews(views, sizes, blanks, timeout)


def make_buckets(recipe: Recipe, listing: Listing, tokenizer: Tokenizer, synthetic: bool = False) -> list[Bucket]:
    """Return the files by the size of signal that suits them, and by what the samples of a batch must agree in.

    All are in one bucket where the recipe has one size and they need not agree in anything. Raises UserError where the
    files do not say what they would have to agree in.
    """
    groups = agreeing(listing, recipe.objective.together)
    buckets = [
        bucket._replace(members=members, substitutes=None if group is None else sorted(group))
        for bucket in sized_buckets(recipe, listing, tokenizer, synthetic)
        for group in groups
        if (members := bucket.members if group is None else [i for i in bucket.members if i in group])
    ]
    window = recipe.data.window
    return [one._replace(blocks=blocks_of([listing.paths[i] for i in one.members], window)) for one in buckets]


def agreeing(listing: Listing, column: str | None) -> list[set[int] | None]:
    """Return the files that have one value in a manifest's ``column``, for each value in it; None: all files."""
    if column is None:
        return [None]
    groups: dict[str, set[int]] = {}
    for i, value in enumerate(listing.labels(column)):
        groups.setdefault(value, set()).add(i)
    return list(groups.values())


def sized_buckets(recipe: Recipe, listing: Listing, tokenizer: Tokenizer, synthetic: bool = False) -> list[Bucket]:
    """Return the files by the size of signal that suits them; rows of several modalities have one size.

    What is ``synthetic`` suits any size: equal shares have each.
    """
    sizes = sizes_of(recipe)
    if len(sizes) == 1:
        return [Bucket(sizes[0], tokenizer.grid, range(len(listing)))]
    ((modality, config),) = recipe.encoders.items()
    kind = MODALITIES[modality]
    found = (i % len(sizes) if synthetic else kind.bucket(path, config.signal) for i, path in enumerate(listing.paths))
    chosen = np.fromiter(found, int)
    return [Bucket(size, tokenizer.grid_of(size), np.flatnonzero(chosen == b).tolist()) for b, size in enumerate(sizes)]
