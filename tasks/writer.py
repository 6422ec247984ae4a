"""What a run leaves in its folder while it trains, and how that is read again."""

import hashlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmssl import checkpoint
from mmssl.checkpoint import Checkpoint
from mmssl.config import read_yaml
from mmssl.contracts import Batch, Keeps
from mmssl.data.ledger import Ledger
from mmssl.data.listing import Listing
from mmssl.data.sample_log import SampleLog
from mmssl.distributed import Council, World, world
from mmssl.engine import Engine
from mmssl.engine.loop import Hooks, ignore
from mmssl.errors import UserError
from mmssl.files import digest, renamed, replacing_folder, save_tensors, write_json
from mmssl.run import Run
from modalities.kept import SAVE
from tasks.build import Recipe, as_objective, build_objective, parse_recipe
from tasks.monitor import Monitor
from tasks.validation import Validator


def say(text: str) -> None:
    """Tell a person something, once: on rank 0, on stderr."""
    if world().is_main:
        print(text, file=sys.stderr, flush=True)


class Writer:
    """Writes what a run leaves behind: metrics, the ledger, checkpoints, the objective and the encoders."""

    def __init__(
        self, run: Run, recipe: Recipe, listing: Listing, engine: Engine, me: World, council: Council,
        validator: Validator | None = None, targets: np.ndarray[Any, Any] | None = None,
    ) -> None:  # fmt: skip
        self.run, self.recipe, self.listing = run, recipe, listing
        self.engine, self.me, self.council, self.validator = engine, me, council, validator
        self.steps = recipe.steps(len(listing))
        self.written, self.began = 0, time.monotonic()
        self.monitor = Monitor(run, recipe, engine.objective, me, council, self.steps, say)
        self.ledger = Ledger(run.ledger_file, write=me.is_main)
        files = hashlib.sha256(listing.contents())
        if targets is not None:
            files.update(targets.tobytes())
        self.files = files.hexdigest()
        self.trained_on = "files" if targets is None else "files or their labels"

    def hooks(self) -> Hooks:
        """Return the loop's hooks."""
        self.status("running")
        samples = SampleLog(self.run.samples_file, self.council, self.me.is_main)
        note = samples.after if self.recipe.data.log_samples else ignore

        def after(step: int, micros: Sequence[Batch]) -> None:
            note(step, micros)
            self.monitor.after(step, micros)

        return Hooks(
            self.checkpoint, self.log, self.broken, self.listing.name, self.validator, self.monitor.before, after
        )

    def status(self, state: Any, **more: Any) -> None:
        """Write ``status.json``; ``step`` is that of the last checkpoint, ``best`` where the weights kept come from."""
        if self.validator is not None and self.validator.best is not None:
            more["best"] = self.validator.best._asdict()
        more["health"] = self.monitor.verdict().as_dict()
        if self.me.is_main:
            self.run.status(state, self.written, self.steps, **more)
        if state == "done":
            self.monitor.finish()

    def fail(self, reason: str) -> None:
        """Write down what ended the run, on whichever rank is left to do so."""
        self.run.status("failed", self.written, self.steps, reason=reason)

    def log(self, line: dict[str, Any]) -> None:
        """Append a line of metrics, and tell what is bad in it."""
        line = self.monitor.see(line)
        if self.me.is_main:
            samples = line["step"] * self.recipe.train.batch_size
            seconds = round(time.monotonic() - self.began, 3)
            epoch = samples / self.recipe.epoch(len(self.listing))
            line |= {"samples": samples, "epoch": epoch, "seconds": seconds}
            self.run.log(line)
            self.monitor.show(line)

    def remark(self, remarks: Sequence[str]) -> None:
        """Tell what is to be said of the files as a whole, and note it in the ledger."""
        for text in remarks:
            say(text)
            self.ledger.note(text)

    def broken(self, index: int, reason: str) -> int:
        """Note a broken file; returns how many there are."""
        self.ledger.add(self.listing.name(index), reason, index=index)
        return self.ledger.count

    def checkpoint(self, step: int) -> None:
        """Write a checkpoint, and from it the objective and the encoder folders. A collective."""
        facts = {
            "step": step,
            "steps": self.steps,
            "samples": step * self.recipe.train.batch_size,
            "seed": self.recipe.train.seed,
            "files": self.files,
            "world": self.me.size,
            "threads": torch.get_num_threads(),
            "precision": self.engine.precision,
        }
        if self.engine.scale is not None:
            facts["loss_scale"] = self.engine.scale.facts()
        if self.validator is not None:
            facts["validation"] = self.validator.facts()
        path = checkpoint.save(
            self.run.checkpoints, self.engine, facts, self.me, self.council, self.recipe.checkpoint.keep
        )
        self.written = step
        if self.me.is_main:
            self.export(Checkpoint(path, verify=slice(0)))
        self.status("running")

    def resume(self) -> int:
        """Load the newest readable checkpoint and return its step; 0 where none was written yet. A collective."""
        if not self.council.gather(checkpoint.checkpoints(self.run.checkpoints))[0]:
            say(f"{self.run.path} has no checkpoint yet: starting from the first step")
            return 0
        found, notes = checkpoint.newest(self.run.checkpoints, self.me, self.council)
        for note in notes:
            say(note)
        if found.facts["files"] != self.files:
            raise UserError(f"--resume: the {self.trained_on} are not those that {found.path} was trained on")
        if found.step > self.steps:
            raise UserError(f"--resume: {found.path} is already past the {self.steps} steps asked for")
        if found.facts["threads"] != torch.get_num_threads():
            say(f"{torch.get_num_threads()} threads instead of {found.facts['threads']}: the last bits may differ")
        if found.facts.get("precision", self.engine.precision) != self.engine.precision:
            say(f"products are in {self.engine.precision} instead of {found.facts['precision']}: losses will differ")
        if found.facts["steps"] != self.steps:
            say(f"{self.steps} steps instead of {found.facts['steps']}: the learning rate follows the new schedule")
        self._restore_validation(found)
        if self.engine.scale is not None and "loss_scale" in found.facts:
            self.engine.scale.restore(found.facts["loss_scale"])
        self.engine.load(found.read, found.step)
        if self.me.is_main:
            # A kill between a checkpoint and its export left an older encoder, or none.
            self.export(found)
            self.run.rewind(found.step)
            self.began -= max((line["seconds"] for line in self.run.metrics()), default=0.0)
        self.written = found.step
        self.monitor.resume(found.step)
        say(f"resuming from step {found.step} of {self.steps}")
        return found.step

    def _restore_validation(self, found: Checkpoint) -> None:
        before = found.facts.get("validation")
        now = None if self.validator is None else self.validator.facts()
        if (before or {}).get("fingerprint") != (now or {}).get("fingerprint"):
            raise UserError(f"--resume: the validation files are not those that {found.path} was measured on")
        if self.validator is not None and before is not None:
            self.validator.restore(before)

    def export(self, source: Checkpoint) -> None:
        """Write ``objective/`` and the encoder folders: the best weights, else the checkpoint's (encoders averaged)."""
        best = None if self.validator is None else self.validator.weights()
        export(
            self.run,
            self.recipe,
            self.engine.objective,
            best or source.weights(averaged=False),
            best or source.weights(averaged=True),
        )
        if self.validator is not None:
            self.validator.tidy()


def export(
    run: Run, recipe: Recipe, objective: nn.Module, whole: Mapping[str, Tensor], averaged: Mapping[str, Tensor]
) -> None:
    """Write ``objective/`` with the weights ``whole``, the encoder folders (and a classifier) with ``averaged``."""
    with replacing_folder(run.path / "objective") as aside:
        save_tensors(aside / "model.safetensors", whole)
        write_json(aside / "config.json", recipe.as_dict())

    def part(module: Any) -> Mapping[str, Tensor]:
        # By the tensors themselves: a part of a head may be of several heads, and has one name.
        own = module.state_dict(keep_vars=True).items()
        return renamed(averaged, {name: names[id(tensor)] for name, tensor in own})

    names = {id(tensor): name for name, tensor in objective.state_dict(keep_vars=True).items()}
    encoders = as_objective(objective).encoders()
    kept = objective.kept() if isinstance(objective, Keeps) else {}
    # Folders are replaced one after the other: what is in all of them says which belong together.
    together = {"export": digest(averaged)} if len(kept) > 1 else {}
    for modality, encoder in encoders.items():
        with replacing_folder(run.encoder_folder(modality, len(encoders) == 1)) as aside:
            encoder.save(aside, part(encoder))
            if modality in kept:
                SAVE[kept[modality].name](aside, {**kept[modality].facts, **together}, part(kept[modality].head))


def load_objective(path: Path) -> tuple[Recipe, nn.Module]:
    """Return the recipe and the trained objective of a run folder, on the CPU and in evaluation mode."""
    run = Run(path)
    weights = path / "objective" / "model.safetensors"
    if not weights.is_file():
        raise UserError(f"{path} is not a run with a trained objective (no {weights.relative_to(path)})")
    recipe = parse_recipe(read_yaml(run.config_file), str(run.config_file))
    objective = build_objective(recipe)
    try:
        objective.load_state_dict(load_file(weights))
    except (OSError, RuntimeError, SafetensorError) as error:
        words = str(error).splitlines()[-1].strip()
        raise UserError(f"{weights}: not the weights of {run.config_file} ({words})") from None
    return recipe, objective.eval()
