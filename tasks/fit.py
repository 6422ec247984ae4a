"""Training a recipe on files into a run folder: what pre-training and fine-tuning share.

Every rank walks through the same steps; rank 0 alone writes and talks.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mmssl import checkpoint
from mmssl.config import Piece, flat, read_yaml, validate
from mmssl.data.listing import Listing
from mmssl.distributed import Council, World, world
from mmssl.engine.loop import Limits, Pace, train
from mmssl.engine.schedule import WarmupCosine
from mmssl.engine.watch import Watch
from mmssl.errors import MmsslError, Stopped, UserError
from mmssl.run import Run
from modalities.encoder import MODALITIES
from tasks.batches import agreeing, make_batches
from tasks.board import check_board
from tasks.build import (
    Recipe,
    Tower,
    build_engine,
    build_objective,
    deepspeed_settings,
    default_device,
    parse_recipe,
)
from tasks.initial import Taken, Weights, collapsed, known_tokenizer, read_weights, take, tower_weights
from tasks.monitor import pace_of
from tasks.validation import Validation, Validator
from tasks.writer import Writer, say

MAY_DIFFER = (
    "train.steps", "train.epochs", "train.engine", "train.hang_minutes", "train.tensorboard", "data.workers",
    "data.max_bad_fraction", "data.log_samples", "checkpoint.",
)  # fmt: skip
"""What may be changed when a run is resumed."""


def fit(
    recipe: Recipe,
    listing: Listing,
    run: Run,
    targets: np.ndarray[Any, Any] | None = None,
    initial: Weights | None = None,
    resume: bool = False,
    deepspeed_config: str | None = None,
    validation: Validation | None = None,
    before: Callable[[World, Council], object] | None = None,
) -> None:
    """Train ``recipe`` on the files of ``listing`` into the folder of ``run``, from its last checkpoint if ``resume``.

    ``targets`` are class indices int64 [n] or float32 [n, classes] per file, for supervised objectives; ``initial``
    are what to start from, as ``train.init_from``. With ``validation``, for a classifier, the run folder holds the
    weights that do best on it, and training stops when ``train.patience`` is at its end. ``before`` is a collective
    that may refuse while there is no run folder yet and nothing is trained.
    Raises what ``mmssl.engine.loop.train`` raises, after writing ``status.json``, and UserError for what does not fit.
    """
    me = world()
    check_batch(recipe, me)
    check_locked(recipe)
    check_board(recipe)
    fresh = not (resume and checkpoint.checkpoints(run.checkpoints))
    recipe = resumable(recipe, run) if resume else inherited(recipe)
    recipe, remarks = learned(recipe, listing) if fresh else (recipe, [])
    ds = deepspeed_settings(recipe, me, deepspeed_config)
    objective = build_objective(recipe)
    if fresh:
        start_from(objective, recipe, initial)
    agreeing(listing, recipe.objective.together)  # what is missing for it is told before there is a run folder
    validator = None if validation is None else make_validator(validation, recipe, objective, run, len(listing))
    device = default_device() if ds is None else join(me)
    council = Council(me.size)
    if before is not None:
        before(me, council)
    if validator is not None:
        validator.check(me, council)
    council.lead(me, lambda: occupy(run, recipe, resume))
    with run:
        engine = build_engine(recipe, objective, device, ds)
        if validator is not None:
            validator.attach(engine, me, council, say)
        writer = Writer(run, recipe, listing, engine, me, council, validator, targets)
        watch = Watch(me, council, recipe.train.hang_minutes, writer.fail)
        with watch.watching():
            start = writer.resume() if resume else 0
            if not start:
                writer.remark(remarks)
            carry_out(writer, watch, targets, start)


def carry_out(writer: Writer, watch: Watch, targets: np.ndarray[Any, Any] | None, start: int) -> None:
    """Train from step ``start`` on, and write into ``status.json`` how it ended. A collective."""
    recipe, listing, engine, validator = writer.recipe, writer.listing, writer.engine, writer.validator
    me, council, files = writer.me, writer.council, len(writer.listing)
    try:
        if start < writer.steps and not (validator is not None and validator.enough):
            batches = make_batches(recipe, listing, engine.objective, targets, me, start, engine.device)
            limits = make_limits(recipe, files, pace_of(recipe, me))
            hooks = watch.hooks(writer.hooks(), start)
            train(engine, batches, make_schedule(recipe, files), limits, hooks, me, council, start)
            if validator is not None and validator.enough:
                say(f"stopped early: train.patience {recipe.train.patience} is used up; the best weights are kept")
    except Stopped as stopped:
        writer.status("stopped", reason=str(stopped))
        raise
    except (MmsslError, OSError, KeyboardInterrupt) as error:
        writer.status("failed", reason=str(error) or type(error).__name__)
        raise
    finally:
        engine.close()
    writer.status("done", seconds=round(time.monotonic() - writer.began, 1))
    council.gather(None)  # whoever reads the run folder next, on any rank, finds it complete


def occupy(run: Run, recipe: Recipe, resume: bool) -> None:
    """Make the run folder unless it is resumed, and keep others out of it."""
    if not resume:
        run.create(recipe.as_dict())
    run.hold()


def inherited(recipe: Recipe) -> Recipe:
    """Return the recipe with the tokenizers of what its encoders start from, where its own settings leave all open.

    Raises UserError where they do not go with the settings that it has.
    """
    for name, config in recipe.encoders.items():
        source = getattr(config, "init_from", None) or recipe.train.init_from
        known, settings = known_tokenizer(source, name), config.model.tokenizer
        wanted = left_open(settings)
        if not wanted or known.get("name") != getattr(settings, "name", None) or wanted != nullable(settings):
            continue
        theirs = ", ".join(f"{key} {known[key]}" for key, value in settings if value not in (None, known.get(key)))
        where = f"{recipe.prefix(name)}model.tokenizer does not go with that of {source} ({theirs})"
        values = settings.model_dump() | {key: known[key] for key in wanted if key in known}
        recipe = recipe.with_tokenizer(name, validate(type(settings), values, where))
    return recipe


def learned(recipe: Recipe, listing: Listing) -> tuple[Recipe, list[str]]:
    """Return the recipe with what its tokenizers learn from the files, and what is to be said of it."""
    remarks: list[str] = []
    for name, config in recipe.encoders.items():
        paths = [path for path in listing.media.get(name, listing.paths) if path is not None]
        tokenizer, more = MODALITIES[name].learn(paths, config.signal, config.model.tokenizer)
        recipe = recipe.with_tokenizer(name, tokenizer)
        remarks += more
    return recipe, remarks


def nullable(settings: Piece) -> list[str]:
    """Return the names of settings that are null unless they are given: what is learned or taken from elsewhere."""
    return [key for key, field in type(settings).model_fields.items() if field.default is None]


def left_open(settings: Piece) -> list[str]:
    """Return the names of settings that could be given and are not."""
    return [key for key in nullable(settings) if getattr(settings, key) is None]


def start_from(objective: nn.Module, recipe: Recipe, initial: Weights | None) -> None:
    """Copy into the objective what it is to start from, and tell what fitted.

    That is ``initial`` or what is at ``train.init_from``, and then for single towers what is at theirs.
    """
    for weights in sources(recipe, initial):
        taken = take(objective, weights)
        say(str(taken))
        check_kept(recipe, taken)


def sources(recipe: Recipe, initial: Weights | None = None) -> list[Weights]:
    """Return what a recipe's objective is to start from, in the order in which it is copied."""
    if recipe.train.init_from is not None:
        initial = read_weights(Path(recipe.train.init_from))
    towers = {name: getattr(config, "init_from", None) for name, config in recipe.encoders.items()}
    singly = [tower_weights(Path(path), name) for name, path in towers.items() if path is not None]
    found = ([] if initial is None else [initial]) + singly
    for weights in found:
        check_heads(recipe, weights)
    return found


def check_heads(recipe: Recipe, weights: Weights) -> None:
    """Raise UserError where weights are of another number of heads, which fits in shape and means something else."""
    for name, config in recipe.encoders.items():
        prefix = recipe.prefix(name)
        there, here = weights.backbone.get("num_heads"), getattr(config.model.backbone, "num_heads", None)
        if list(weights.grids) == [prefix or "encoder."] and None not in (there, here) and there != here:
            key = f"{prefix}model.backbone.num_heads"
            raise UserError(
                f"{key} is {here}, but the weights of {weights.source} are of {there} heads: set {key}={there}"
            )


def check_kept(recipe: Recipe, taken: Taken) -> None:
    """Raise UserError where a locked tower is not quite what it starts from."""
    for name in getattr(recipe.objective, "locked", ()):
        prefix = f"towers.{name}."
        other = [one for one in (*taken.fresh, *taken.misfits, *taken.unknown) if one.startswith(prefix)]
        if other and any(one.startswith(prefix) for one in taken.copied):
            raise UserError(
                f"objective.locked: '{name}' is to stay what {taken.source} is, but differs from it in "
                f"{', '.join(collapsed(other, other))}; give towers.{name} the settings of {taken.source}"
            )


def check_batch(recipe: Recipe, me: World) -> None:
    """Raise UserError where the batch does not divide into the ranks' micro-batches, or they cannot be mixed."""
    batch, accumulate = recipe.train.batch_size, recipe.train.accumulate
    if batch % (me.size * accumulate):
        raise UserError(
            f"train.batch_size {batch} does not divide by {me.size} ranks x train.accumulate {accumulate}, but "
            f"{dividing(batch, me.size * accumulate * recipe.objective.micro_batch_multiple)}"
        )
    if recipe.objective.several and batch == accumulate:
        raise UserError(
            f"train.batch_size {batch} with train.accumulate {accumulate} compares one row at a time, which there is "
            "nothing to tell from: the loss is over the rows of a micro-batch on all ranks; use two or more"
        )
    if recipe.objective.several and recipe.data.repeats > 1:
        raise UserError("data.repeats takes several looks at a row, each of which would be told from the others; use 1")
    if recipe.objective.micro_batch_multiple > 1 and recipe.data.repeats > 1:
        raise UserError("objective.mix mixes neighbours, which data.repeats makes the same file; use one of them")
    micro, multiple = batch // (me.size * accumulate), recipe.objective.micro_batch_multiple
    if micro % multiple:
        raise UserError(
            f"train.batch_size {batch} makes micro-batches of {micro} samples, but objective.mix needs a multiple of "
            f"{multiple}: samples are mixed in pairs"
        )


def dividing(batch: int, least: int) -> str:
    """Return the nearest batches that are multiples of ``least``, in words: "96 and 104 do"."""
    below, above = batch // least * least, (batch // least + 1) * least
    return f"{below} and {above} do" if below else f"{above} does"


def check_locked(recipe: Recipe) -> None:
    """Raise UserError where a tower is to keep the weights it starts from, and these are random."""
    for name in getattr(recipe.objective, "locked", ()):
        tower = recipe.encoders.get(name)
        if isinstance(tower, Tower) and tower.init_from is None and recipe.train.init_from is None:
            raise UserError(
                f"objective.locked: '{name}' would stay as random as it starts; give towers.{name}.init_from"
            )


def resumable(recipe: Recipe, run: Run) -> Recipe:
    """Return the recipe with what the tokenizers of a run learned, so that nothing they had it from is needed.

    Raises UserError where there is no run, or it was made by a recipe that computes something else.
    """
    if not run.config_file.is_file():
        raise UserError(f"--resume: {run.path} is not a run folder (it holds no {run.config_file.name})")
    stored = parse_recipe(read_yaml(run.config_file), str(run.config_file))
    before, now = flat(stored.as_dict()), flat(recipe.as_dict())
    learned_then = {
        f"{recipe.prefix(name)}model.tokenizer.{key}"
        for name, config in recipe.encoders.items()
        for key in left_open(config.model.tokenizer)
    }
    for key in sorted((before.keys() | now.keys()) - learned_then):
        if before.get(key) != now.get(key) and not key.startswith(MAY_DIFFER):
            here, there = (shortened(values.get(key)) for values in (now, before))
            raise UserError(f"--resume: {key} is {here} here but {there} in {run.config_file}")
    for name, config in stored.encoders.items():
        recipe = recipe.with_tokenizer(name, config.model.tokenizer)
    return recipe


def shortened(value: Any) -> str:
    """Return a setting in at most a line: a vocabulary is a long one."""
    text = str(value)
    return text if len(text) <= 100 else f"{text[:100]!r} and so on"


def make_validator(validation: Validation, recipe: Recipe, objective: nn.Module, run: Run, files: int) -> Validator:
    """Return what measures ``objective`` as often as the recipe says."""
    length, steps = recipe.train, recipe.steps(files)
    every = max(1, round(length.validate_every * recipe.epoch(files) / length.batch_size))
    return Validator(validation, objective, run, every, steps, length.patience, length.ema is not None)


def join(me: World) -> torch.device:
    """Join the other ranks through DeepSpeed, and return this rank's device."""
    from mmssl.engine.deepspeed_setup import connect

    return connect(me, default_device().type)


def make_schedule(recipe: Recipe, files: int) -> WarmupCosine:
    """Return the learning-rate schedule on ``files`` files."""
    optim, batch, steps = recipe.optim, recipe.train.batch_size, recipe.steps(files)
    warmup = optim.warmup_steps(steps, recipe.epoch(files) / batch)
    return WarmupCosine(optim.peak_lr(batch), steps, warmup, optim.min_lr)


def make_limits(recipe: Recipe, files: int, pace: Pace | None = None) -> Limits:
    """Return when the loop writes, logs and gives up on ``files`` files."""
    length, every = recipe.train, recipe.checkpoint
    return Limits(
        steps=recipe.steps(files),
        accumulate=length.accumulate,
        batch_size=length.batch_size,
        log_every=length.log_every,
        checkpoint_steps=every.every_steps,
        checkpoint_minutes=every.every_minutes,
        max_broken=int(recipe.data.max_bad_fraction * files),
        seed=length.seed,
        pace=pace,
    )
