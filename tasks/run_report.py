"""What every run's report shows: the loss, reconstructions where the objective makes any, the cost and the recipe."""

import numpy as np
import torch

from mmssl.contracts import Reconstructs
from mmssl.data.dataset import Key, Samples, collate
from mmssl.data.listing import Listing
from mmssl.run import Run
from modalities.encoder import MODALITIES
from tasks.build import Recipe, measure_cost
from tasks.fit import load_objective
from tasks.report import Code, Curve, Facts, Pictures, Section


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
        sections.append(Curve("Accuracy", "step", "accuracy on training batches", {"training": (steps, accuracy)}))
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
    samples = Samples(
        [shown.paths[i] for i in picks], kind.decode, lambda decoded, _rng: transform(decoded),
        objective.draw(), recipe.train.seed, recipe.data.timeout,
    )  # fmt: skip
    batch, _ = collate([samples[Key(0, i)] for i in range(len(picks))])
    if not batch:  # so many broken files that there is nothing to show
        return []
    filled, hidden = objective.reconstruct(batch)
    grey = torch.zeros_like(filled)
    rows = []
    for signal, prediction, mask in zip(batch["signal"], filled, hidden, strict=True):
        panels = (signal, torch.where(mask > 0, grey[0], signal), prediction)
        rows.append([kind.picture(panel, recipe.signal) for panel in panels])
    which = "Pictures that were not trained on" if held_out else "Pictures that were trained on"
    note = f"{which}; {recipe.objective.name} saw only what the middle column shows."
    if getattr(recipe.model.tokenizer, "target", None) == "normalized":
        note += (
            " Predictions are of normalised patches: the brightness and contrast of each hidden patch are those of the "
            "true one, only its content is predicted."
        )
    return [Pictures("Reconstructions", note, ["input", "masked", "reconstruction"], rows)]
