"""What every run's report shows: the loss, reconstructions where the objective makes any, the cost and the recipe."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from mmssl.contracts import Reconstructs
from mmssl.data.listing import Listing
from mmssl.errors import UnusableData
from mmssl.run import Run
from modalities.encoder import MODALITIES
from tasks.build import EncoderRecipe, Recipe
from tasks.monitor import cost_of
from tasks.panels import read_example, read_rate
from tasks.panels_reconstruction import attempt, given, seen_note, sound_note, target_note, triplet
from tasks.report import Code, Curve, Facts, Pictures, Section
from tasks.report_ahead import ahead_sections
from tasks.report_health import health_sections
from tasks.report_pairs import pair_sections
from tasks.writer import load_objective

MOST_LINES, SHOWN_LINES = 20, 3
"""A setting of more lines is shortened to so many."""


def run_sections(run: Run, shown: Listing, held_out: bool = False) -> list[Section]:
    """Return the report's sections for a run: curves, reconstructions of files in ``shown``, cost, recipe."""
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
    sections += ahead_sections(metrics)
    sections += pair_sections(metrics, recipe.train.batch_size // recipe.train.accumulate)
    if isinstance(objective, Reconstructs) and isinstance(recipe, EncoderRecipe):
        sections += reconstructions(recipe, objective, shown, held_out)
    sections += health_sections(metrics, run.steps)
    cost = cost_of(recipe)
    rates = [record["samples_per_s"] for record in metrics]
    waits = [record["wait"] for record in metrics]
    facts = {
        "Training time": f"{metrics[-1]['seconds']:.0f} s",
        "Samples per second": f"{np.median(rates):,.0f}",
        "Waiting for data": f"{100 * float(np.mean(waits)):.0f} %",
        "Parameters": f"{cost.parameters:,}",
        **flops(cost.gflop_forward),
        "GFLOP per second": f"{np.median(rates) * cost.gflop_train:,.3g}",
        **utilisation(metrics),
        "Samples seen": f"{metrics[-1]['samples']:,}",
    }
    return [*sections, Facts("Cost", facts), recipe_section(recipe)]


def utilisation(metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the share of what the devices can do, where that is known of them."""
    shares = [record["mfu"] for record in metrics if "mfu" in record]
    return {"Of the peak (MFU)": f"{100 * float(np.median(shares)):.0f} %"} if shares else {}


def recipe_section(recipe: Recipe) -> Code:
    """Return the recipe's page; of a text as long as a learned vocabulary, its first lines and how many there are."""
    page, cut = shortened(recipe.as_dict())
    note = "Long texts are shortened here; the run's config.yaml has all of them." if cut else ""
    return Code("Recipe", yaml.safe_dump(page, sort_keys=False, allow_unicode=True), note)


def shortened(value: Any) -> tuple[Any, bool]:
    """Return plain values with long texts in them shortened, and whether there were any."""
    if isinstance(value, dict):
        parts = {key: shortened(one) for key, one in value.items()}
        return {key: one for key, (one, _) in parts.items()}, any(cut for _, cut in parts.values())
    lines = value.splitlines() if isinstance(value, str) else []
    if len(lines) <= MOST_LINES:
        return value, False
    more = f"and {len(lines) - SHOWN_LINES:,} more of {len(lines):,} lines"
    return ", ".join([*lines[:SHOWN_LINES], more]), True


def flops(gflop: float) -> dict[str, str]:
    """Return a number of operations under a name whose unit suits its size."""
    unit, number = ("GFLOP", gflop) if gflop >= 1 else ("MFLOP", 1000 * gflop)
    return {f"{unit} per sample, forward": f"{number:.3g}"}


def reconstructions(
    recipe: EncoderRecipe, objective: Reconstructs, shown: Listing, held_out: bool, most: int = 8
) -> list[Pictures]:
    """Return what there is, what is seen and what is predicted of files spread evenly over ``shown``, to be played."""
    kind = MODALITIES[recipe.modality]
    picks = np.linspace(0, len(shown) - 1, min(most, len(shown))).astype(int).tolist()
    ratio = getattr(recipe.objective, "mask_ratio", 0.0)
    rows, names = [], [""]
    for i in picks:
        try:
            example = read_example(recipe, shown.paths[i], recipe.data.timeout)
            rate = read_rate(recipe, shown.paths[i], recipe.data.timeout)
        except UnusableData:
            continue  # it is in the ledger
        rng = np.random.default_rng([recipe.train.seed, i])
        made = attempt(objective, objective.draw(), ratio, example, rng)
        names = [*given(recipe, made), "input", "masked", "reconstruction", "in motion"]
        rows.append([*given(recipe, made).values(), *triplet(recipe, made, True, rate)])
    if not rows:
        return []
    columns = names[: len(rows[0])]
    which = "Files that were not trained on" if held_out else "Files that were trained on"
    note = f"{which}; {seen_note(recipe, 'masked pictures')}{target_note(recipe)}{sound_note(kind)}"
    return [Pictures("Reconstructions", note, columns, rows)]
