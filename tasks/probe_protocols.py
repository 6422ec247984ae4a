"""Probes of a frozen encoder as papers train them: named, pinned, and shown with every setting.

They run through the same loop as everything else: fine-tuning in which nothing but the head is trained. Scores of
different protocols are different numbers and never stand in one table.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mmssl.config import flat, override
from mmssl.data.listing import Listing
from mmssl.errors import Stopped, UnusableData, UserError, nearest
from mmssl.files import write_json
from mmssl.objectives.classify import ClassifyConfig
from mmssl.run import Run
from modalities.encoder import Encoder
from tasks.build import Recipe, parse_recipe
from tasks.features import Samples, class_targets
from tasks.finetune import evaluate, weights_of
from tasks.fit import fit
from tasks.linear_probe import ProbeResult, linear_probe
from tasks.metrics import Score, score_table, scores_as_dict
from tasks.per_layer import PerLayerResult, per_layer_probe
from tasks.report import Section, Table, Words, write_report
from tasks.run_report import run_sections
from tasks.validation import readable

Settings = dict[str, Any]

CROPS: Settings = {"crop_scale": [0.08, 1.0], "crop_ratio": [3 / 4, 4 / 3], "flip": True, "augment": {}}
"""Random resized crops and flips, torchvision's defaults (Inception, arXiv:1409.4842), which all of them train on."""

BASE_WIDTH = 768
"""From the width of ViT-B on, DINO's protocol takes an encoder for a base model, below for a small one."""

IMAGENET = 1_281_167
"""Training pictures of ImageNet-1k, for which the protocols were made."""

UNSEEN = ("data.workers", "data.timeout", "data.max", "checkpoint.", "train.engine", "train.log_every", "train.seed",
          "train.validate_every", "train.patience")  # fmt: skip
"""Keys that are no part of a protocol: they leave the expected score as it is."""

FIXED = {
    "modality": "it is the encoder's",
    "model": "the architecture is the encoder's",
    "train.init_from": "a probe starts from ENCODER",
    "train.ema": "a probe's encoder does not move",
    "train.validate_every": "a probe is measured after its last step",
    "train.patience": "a probe is measured after its last step",
    "objective.name": "a probe classifies",
    "objective.classes": "the classes are the sorted training labels",
    "objective.train_blocks": "a probe's encoder is frozen; use mmssl finetune to train it",
    "objective.multi_label": "a probe has one label per file",
}
"""Keys that a probe does not leave open, and why."""


def mae(encoder: Encoder) -> Settings:
    """Return MAE's linear probe (arXiv:2111.06377, appendix A.1, table 10, and the paper's public code).

    LARS at 0.1 per 256 samples, no decay, batches of 16384, 90 epochs, 10 of them warm-up, and batch norm without gain
    and bias before the linear layer. The class token is probed, or the mean token where there is none. The public code
    draws a crop once and clips it to the picture; here, as in torchvision, it is drawn until it fits.
    """
    return {
        "head": {"pool": "cls" if encoder.num_prefix else "mean", "layers": 1, "batch_norm": True},
        "optim": {"name": "lars", "base_lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "warmup": "10ep"},
        "train": {"epochs": 90, "batch_size": 16384},
    }


def dino(encoder: Encoder) -> Settings:
    """Return DINO's linear probe (arXiv:2104.14294, by the defaults and the advice of the paper's public code).

    SGD at 0.001 per 256 samples, no decay, batches of 1024, 100 epochs, no warm-up. A small model's vector is the class
    tokens of its last 4 blocks, a base model's the last class token and the mean of the patch tokens; the width decides
    (``BASE_WIDTH``). Without a class token the mean stands for it. The code recommends another learning rate for each
    encoder, which ``optim.base_lr`` sets. It lowers the rate once per epoch, resizes crops bilinearly and reports the
    best epoch on the test set; here the rate falls with each step, crops are made as the modality makes them, and the
    last step is what is measured.
    """
    small = encoder.dim < BASE_WIDTH
    pool = ("cls" if small else "cls+mean") if encoder.num_prefix else "mean"
    layers = min(4, max(1, encoder.config.model.blocks)) if small else 1
    return {
        "head": {"pool": pool, "layers": layers, "batch_norm": False},
        "optim": {"name": "sgd", "base_lr": 0.001, "momentum": 0.9, "weight_decay": 0.0, "warmup": 0.0},
        "train": {"epochs": 100, "batch_size": 1024},
    }


def attentive(encoder: Encoder) -> Settings:
    """Return V-JEPA's attentive probe of images (arXiv:2404.08471, by its public configuration for ImageNet).

    A learned query attends to the patch tokens with as many heads as the encoder has (a GRU has none: one), in a block
    with an MLP. AdamW at 0.001 whatever the batch, decay 0.001, batches of 1024 (64 processes of 16), 20 epochs, no
    warm-up, gradients clipped to norm 1. V-JEPA also lets the decay fall to 1e-6 by a cosine and trains with
    AutoAugment and random erasing; here the decay is constant and there are crops and flips alone.
    """
    heads = getattr(encoder.config.model.backbone, "num_heads", 1)
    return {
        "head": {"pool": "attentive", "layers": 1, "batch_norm": False, "num_heads": heads},
        "optim": {"name": "adamw", "lr": 0.001, "weight_decay": 0.001, "betas": [0.9, 0.999], "warmup": 0.0, "clip": 1},
        "train": {"epochs": 20, "batch_size": 1024},
    }


PROTOCOLS: dict[str, Callable[[Encoder], Settings]] = {"mae": mae, "dino": dino, "attentive": attentive}
NAMES = ("logistic", *PROTOCOLS)


@dataclass(frozen=True)
class Pinned:
    """A protocol made for an encoder and a training set: the recipe that runs, and what in it is not as pinned."""

    name: str
    recipe: Recipe
    deviations: dict[str, Any]
    """Dotted keys that were set to something else than the protocol says."""
    notes: list[str]

    @property
    def title(self) -> str:
        """The name, with what was changed: "mae, but train.epochs=5"."""
        changes = ", ".join(f"{key}={plain(value)}" for key, value in self.deviations.items())
        return f"{self.name}, but {changes}" if changes else self.name

    def settings(self) -> dict[str, Any]:
        """Return every setting that makes the score what it is, by dotted key."""
        data = self.recipe.as_dict()
        del data["objective"]["classes"]
        whole = flat({key: data[key] for key in ("signal", "objective", "optim", "train", "data")})
        optim, train = self.recipe.optim, self.recipe.train
        # What the optimiser does not look at is no setting of the protocol.
        unused = {"optim.momentum"} if optim.name == "adamw" else {"optim.betas", "optim.eps"}
        unused.add("optim.lr" if optim.lr is None else "optim.base_lr")
        facts = {key: value for key, value in whole.items() if not key.startswith(UNSEEN) and key not in unused}
        return {**facts, "train.seed": train.seed, "peak_lr": optim.peak_lr(train.batch_size)}

    def as_dict(self) -> dict[str, Any]:
        """Return the protocol for JSON."""
        return {"name": self.name, "title": self.title, "deviations": self.deviations, **self.settings()}

    def lines(self) -> list[str]:
        """Return the protocol in words, a line per section of the recipe: its settings, but for what is off."""
        sections: dict[str, list[str]] = {}
        for key, value in self.settings().items():
            if value is not None and value is not False:
                sections.setdefault(key.partition(".")[0], []).append(f"{key}={plain(value)}")
        return [f"protocol {self.title}", *(", ".join(words) for words in sections.values())]


def pin(
    name: str,
    encoder: Encoder,
    classes: list[str],
    files: int,
    overrides: Mapping[str, Any] | None = None,
    seed: int = 0,
    skip_broken: bool = False,
) -> Pinned:
    """Return the protocol ``name`` for an encoder and ``files`` training files, changed by dotted ``overrides``.

    The batch is at most the training set, cut to what divides into micro-steps. Raises UserError for a name, a key or a
    value that is not valid, and for an encoder of what has no crops.
    """
    if name not in PROTOCOLS:
        raise UserError(f"--protocol {name}: no such protocol{nearest(name, NAMES)}")
    if not all(hasattr(encoder.config.signal, key) for key in CROPS):
        raise UserError(
            f"--protocol {name} trains on crops of pictures, and this encoder is of modality {encoder.modality}; "
            "take --protocol logistic"
        )
    overrides = flat(overrides or {})
    for key in overrides:
        for fixed, reason in FIXED.items():
            if f"{key}.".startswith(f"{fixed}."):
                raise UserError(f"{key} cannot be set here: {reason}")
    settings = PROTOCOLS[name](encoder)
    base = encoder.config.model_dump(mode="json", include={"modality", "signal", "model"})
    base["signal"] |= CROPS
    base["objective"] = {"name": "classify", "classes": classes, "train_blocks": 0, "head": settings["head"]}
    base["optim"] = settings["optim"]
    # A probe measures: a training file that cannot be read ends it, unless asked to go on.
    base["data"] = {"max_bad_fraction": 1.0 if skip_broken else 0.0}
    parts = overrides.get("train.accumulate", 1)
    parts = parts if isinstance(parts, int) and 0 < parts <= files else 1
    batch = min(settings["train"]["batch_size"], files // parts * parts)
    base["train"] = {**settings["train"], "seed": seed, "batch_size": batch}
    where = f"--protocol {name}"
    pinned, recipe = parse_recipe(base, where), parse_recipe(override(base, overrides), where)
    return Pinned(name, recipe, differences(pinned, recipe), remarks(recipe, settings["train"], batch, files))


def remarks(recipe: Recipe, published: Settings, cut: int, files: int) -> list[str]:
    """Return what a reader must know who compares a score with the paper's; ``cut`` is the batch made to fit."""
    notes = []
    if recipe.train.batch_size == cut < published["batch_size"]:
        notes.append(f"the batch is {cut} instead of {published['batch_size']}: there are {files} training files")
    steps, meant = recipe.steps(files), round(published["epochs"] * IMAGENET / published["batch_size"])
    if steps < meant / 10:
        notes.append(
            f"{steps} steps; on ImageNet the protocol takes {meant}: a low score may be of a head that has not learned "
            "yet (raise train.epochs); --protocol logistic does not depend on the number of steps"
        )
    if recipe.optim.warmup_steps(steps, recipe.epoch(files) / recipe.train.batch_size) >= steps:
        notes.append(f"the warm-up ({recipe.optim.warmup}) fills the whole training: set optim.warmup lower")
    assert isinstance(recipe.objective, ClassifyConfig)
    if recipe.train.accumulate > 1 and recipe.objective.head.batch_norm:
        notes.append("batch norm is over micro-batches: train.accumulate changes the result")
    return notes


def plain(value: Any) -> str:
    """Return a setting as a person would write it: 5, not 5.0."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def differences(pinned: Recipe, recipe: Recipe) -> dict[str, Any]:
    """Return the dotted keys of a recipe that are not as pinned and matter; what only went away is left out."""
    before, now = flat(pinned.as_dict()), flat(recipe.as_dict())
    changed = {key: value for key, value in now.items() if before.get(key) != value and not key.startswith(UNSEEN)}
    exchanged = {"train.epochs", "train.steps"}  # setting one clears the other
    return {key: value for key, value in changed.items() if not (key in exchanged and value is None)}


@dataclass(frozen=True)
class ProtocolResult:
    """What a probe scored, under which protocol."""

    scores: dict[str, Score]
    protocol: Pinned
    steps: int
    samples: Samples
    run: Path | None
    """The run folder, if it was kept."""
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON; scores are fractions."""
        return {
            "task": "linear-probe",
            "scores": scores_as_dict(self.scores),
            "protocol": {**self.protocol.as_dict(), "steps": self.steps},
            "run": None if self.run is None else str(self.run),
            **self.samples.as_dict(),
            "notes": self.notes,
        }

    def render(self, console: Console) -> None:
        """Print one table, the protocol with its settings and what a reader must know."""
        console.print(score_table(f"Probe, protocol {self.protocol.title}", {self.protocol.name: self.scores}))
        for line in [f"{self.samples}; {self.steps} steps", *self.protocol.lines(), *self.notes]:
            console.print(line, markup=False, highlight=False)


def probe(
    encoder: Encoder,
    train: Listing,
    test: Listing,
    protocol: str = "logistic",
    out: Path | None = None,
    *,
    per_layer: bool = False,
    label_column: str = "label",
    seed: int = 0,
    skip_broken: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> ProbeResult | PerLayerResult | ProtocolResult:
    """Probe a frozen encoder by ``linear_probe``, ``per_layer_probe`` or ``protocol_probe``, and write the result.

    ``out`` is a folder for ``linear-probe.json``, for the curve by layer (``linear-probe.html``) and, of the protocols
    that train, for the run. Raises UserError for what does not go together, and as those three.
    """
    if protocol != "logistic":
        if per_layer:
            raise UserError(f"--per-layer is for --protocol logistic; leave out --protocol {protocol}")
        return protocol_probe(
            encoder, train, test, protocol, out, label_column=label_column, seed=seed, skip_broken=skip_broken,
            overrides=overrides,
        )  # fmt: skip
    if overrides:
        raise UserError(
            f"{next(iter(overrides))} is a setting of a protocol that trains ({', '.join(PROTOCOLS)}), not of logistic"
        )
    run = per_layer_probe if per_layer else linear_probe
    result = run(encoder, train, test, label_column, seed, skip_broken=skip_broken)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "linear-probe.json", result.as_dict())
        if isinstance(result, PerLayerResult):
            result.write(out / "linear-probe.html")
    return result


def protocol_probe(
    encoder: Encoder,
    train: Listing,
    test: Listing,
    protocol: str,
    out: Path | None = None,
    *,
    label_column: str = "label",
    seed: int = 0,
    skip_broken: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> ProtocolResult:
    """Train a head on the frozen ``encoder`` as ``protocol`` ("mae", "dino", "attentive") says, and measure it.

    ``out`` is the run folder to make; without it the run is thrown away. Dotted ``overrides`` change settings, and the
    result says which. Raises UserError for a mistake, UnusableData for a broken file unless ``skip_broken``.
    """
    classes, targets, test_targets = class_targets(train, test, label_column)
    pinned = pin(protocol, encoder, classes, len(targets), overrides, seed, skip_broken)
    with run_folder(out) as run:
        with sentences(run, skip_broken):
            before = readable(encoder, test, skip_broken)
            fit(pinned.recipe, train, run, np.asarray(targets), weights_of(encoder), before=before)
        scores, samples = evaluate(run, test, test_targets, classes, targets, skip_broken)
        left = len(broken(run))
        notes = [*pinned.notes, *[f"{left} broken training files were left out"][: bool(left)]]
        result = ProtocolResult(scores, pinned, pinned.recipe.steps(len(targets)), samples, out, notes)
        if out is not None:
            write_json(run.path / "linear-probe.json", result.as_dict())
            report(run, result, train)
    return result


@contextmanager
def run_folder(out: Path | None) -> Iterator[Run]:
    """Yield the run in the folder ``out``, which must be empty or not there, or in one that is removed afterwards."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="mmssl-probe-") as folder:
            yield Run(folder)
        return
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give another --out")
    yield Run(out)


@contextmanager
def sentences(run: Run, skip_broken: bool) -> Iterator[None]:
    """Put what training says, which speaks of keys and of resuming, into a probe's words."""
    try:
        yield
    except Stopped as error:
        message = "the probe was stopped, and probes cannot be resumed: start it again"
        raise Stopped(message, error.exit_code - 128) from None
    except UnusableData:
        entries = broken(run)
        if skip_broken or not entries:
            raise
        path, reason = entries[0]
        raise UnusableData(f"{path}: {reason}; evaluation never leaves a file out unasked") from None


def broken(run: Run) -> list[tuple[str, str]]:
    """Return (name, reason) of the files that training met and could not read."""
    if not run.ledger_file.exists():
        return []
    entries = [json.loads(line) for line in run.ledger_file.read_text(encoding="utf-8").splitlines()]
    return [(entry["path"], entry["reason"]) for entry in entries]


def report(run: Run, result: ProtocolResult, train: Listing) -> None:
    """Write the run's report: the scores first, then the protocol."""
    note = f"On {result.samples.test} test files, with 95 % bootstrap intervals."
    columns = ["", *(name.replace("_", " ") for name in result.scores)]
    sections: list[Section] = [
        Table("Scores", note, columns, [[result.protocol.title, *result.scores.values()]]),
        Words("Protocol", "\n\n".join([*result.protocol.lines(), *result.notes])),
    ]
    title = f"{run.path.name}: a frozen encoder probed by {result.protocol.title}"
    write_report(run.report_file, title, str(result.samples), [*sections, *run_sections(run, train)])
