"""What every run's report shows: the loss, reconstructions where the objective makes any, the cost and the recipe."""

import numpy as np
import torch
from torch import Tensor

from mmssl.contracts import Draw, Reconstructs
from mmssl.data.dataset import batch_of_one
from mmssl.data.guard import BrokenFile, guarded
from mmssl.data.listing import Listing
from mmssl.run import Run
from modalities.encoder import MODALITIES
from tasks.build import Recipe, measure_cost
from tasks.report import Code, Curve, Facts, Picture, Pictures, Section
from tasks.writer import load_objective


def run_sections(run: Run, shown: Listing, held_out: bool = False) -> list[Section]:
    """Return the report's sections for a run: loss curve, reconstructions of files in ``shown``, cost, recipe."""
    recipe, objective = load_objective(run.path)
    metrics = run.metrics()
    steps = [record["step"] for record in metrics]
    sections: list[Section] = [
        Curve("Loss", "step", "loss", {"training": (steps, [record["loss"] for record in metrics])})
    ]
    if "accuracy" in metrics[-1]:
        accuracy = [record["accuracy"] for record in metrics]
        sections.append(
            Curve("Accuracy", "step", "accuracy on training batches", {"training": (steps, accuracy)}, percent=True)
        )
    if isinstance(objective, Reconstructs):
        sections += reconstructions(recipe, objective, shown, held_out)
    cost = measure_cost(recipe, objective)
    rates = [record["samples_per_s"] for record in metrics]
    waits = [record["wait"] for record in metrics]
    facts = {
        "Training time": f"{metrics[-1]['seconds']:.0f} s",
        "Samples per second": f"{np.median(rates):,.0f}",
        "Waiting for data": f"{100 * float(np.mean(waits)):.0f} %",
        "Parameters": f"{cost.parameters:,}",
        **flops(cost.gflop_forward),
        # Over the peak of the device, this is the model's utilisation (MFU).
        "GFLOP per second": f"{np.median(rates) * cost.gflop_train:,.3g}",
        "Samples seen": f"{metrics[-1]['samples']:,}",
    }
    return [*sections, Facts("Cost", facts), Code("Recipe", recipe.as_yaml())]


def flops(gflop: float) -> dict[str, str]:
    """Return a number of operations under a name whose unit suits its size."""
    unit, number = ("GFLOP", gflop) if gflop >= 1 else ("MFLOP", 1000 * gflop)
    return {f"{unit} per sample, forward": f"{number:.3g}"}


def reconstructions(
    recipe: Recipe, objective: Reconstructs, shown: Listing, held_out: bool, most: int = 8
) -> list[Pictures]:
    """Return (input, masked, reconstruction) triplets of files spread evenly over ``shown``."""
    kind = MODALITIES[recipe.modality]
    transform = kind.eval_transform(recipe.signal)
    picks = np.linspace(0, len(shown) - 1, min(most, len(shown))).astype(int).tolist()
    rows = []
    for i in picks:
        try:
            signal = transform(guarded(kind.decode, shown.paths[i], recipe.data.timeout))
        except BrokenFile:
            continue  # it is in the ledger
        rng = np.random.default_rng([recipe.train.seed, i])
        rows.append(triplet(recipe, objective, objective.draw(), signal, rng)[0])
    if not rows:
        return []
    which = "Pictures that were not trained on" if held_out else "Pictures that were trained on"
    note = f"{which}; {recipe.objective.name.upper()} saw only what the middle column shows."
    note += target_note(recipe)
    return [Pictures("Reconstructions", note, ["input", "masked", "reconstruction"], rows)]


def triplet(
    recipe: Recipe, objective: Reconstructs, draw: Draw | None, signal: Tensor, rng: np.random.Generator
) -> tuple[list[Picture], float]:
    """Return (what is there, what is seen, what is predicted) of a signal [C, *size], and the share that is hidden."""
    kind = MODALITIES[recipe.modality]
    tokenizer = next(iter(objective.encoders().values())).tokenizer
    filled, hidden = objective.reconstruct(batch_of_one(signal, draw, tokenizer.grid_of(signal.shape[1:]), rng))
    panels = (signal, torch.where(hidden[0] > 0, 0.0, signal), filled[0])
    return [kind.picture(panel, recipe.signal) for panel in panels], float(hidden.mean())


def target_note(recipe: Recipe) -> str:
    """Return what must be said of reconstructions that use the true patches' statistics; nothing where they do not."""
    if getattr(recipe.model.tokenizer, "target", None) != "normalized":
        return ""
    return (
        " Predictions are of normalised patches: the brightness and contrast of each hidden patch are those of the "
        "true one, only its content is predicted."
    )
