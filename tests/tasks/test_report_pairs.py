"""The report of runs that bind modalities: accuracy both ways against chance, the scale, and a recipe that is short."""

import pytest
import yaml
from towers import untrained

from mmssl.run import Run
from tasks.build import load_recipe
from tasks.report_pairs import pair_sections
from tasks.run_report import recipe_section, run_sections, shortened
from tasks.writer import load_objective


def metrics(*others, lines=3):
    """Line i of a run whose images found the others in i / 10 of the cases, and the other way in i / 20."""
    return [
        {
            "step": 10 * i,
            "loss": 2.0,
            "scale": 14.0 + i,
            "samples_per_s": 9.0,
            "wait": 0.0,
            "seconds": 1.0,
            "samples": 8,
        }
        | {f"accuracy_image_to_{one}": i / 10 for one in others}
        | {f"accuracy_{one}_to_image": i / 20 for one in others}
        | ({f"loss_image_{one}": 2.0 - i / 10 for one in others} if len(others) > 1 else {})
        for i in range(lines)
    ]


def test_two_modalities_have_accuracy_both_ways_chance_and_the_scale():
    accuracy, scale = pair_sections(metrics("text"), 128)
    steps = [0, 10, 20]
    assert accuracy.series == {
        "image to text": (steps, [0.0, 0.1, 0.2]),
        "text to image": (steps, [0.0, 0.05, 0.1]),
        "by chance": (steps, [1 / 128] * 3),
    }
    assert accuracy.percent
    assert "128" in accuracy.note
    assert [*scale.series.values()] == [(steps, [14.0, 15.0, 16.0])]


def test_three_modalities_have_a_loss_for_each_pair():
    accuracy, _, losses = pair_sections(metrics("text", "audio"), 64)
    assert len(accuracy.series) == 5
    assert losses.series["image and audio"] == ([0, 10, 20], pytest.approx([2.0, 1.9, 1.8]))
    assert len(losses.series) == 2


def test_other_objectives_have_none():
    assert pair_sections([{"step": 1, "loss": 1.0, "accuracy": 0.5, "accuracy_1": 0.5}], 8) == []


def test_long_texts_are_shortened_wherever_they_stand_and_counted():
    merges = "\n".join(f"a b{i}" for i in range(1500))
    page = {"a": {"merges": merges, "n": 1, "none": None}, "b": [1, 2], "short": "one\ntwo"}
    found, cut = shortened(page)
    assert cut
    assert found == {**page, "a": {**page["a"], "merges": "a b0, a b1, a b2, and 1,497 more of 1,500 lines"}}
    assert shortened({"b": "\n".join("x" * 20)}) == ({"b": "\n".join("x" * 20)}, False)


def test_a_run_of_towers_has_it_all(tmp_path):
    run = Run(untrained(tmp_path / "run", "image", "text"))
    run.metrics = lambda: metrics("text")
    sections = {section.title: section for section in run_sections(run, None)}
    assert [*sections] == ["Loss", "Accuracy both ways", "Scale", "Health: unknown", "Cost", "Recipe"]
    assert sections["Accuracy both ways"].series["by chance"][1] == [1 / 2] * 3  # batches of two
    recipe, _ = load_objective(run.path)
    assert sections["Recipe"].text == recipe.as_yaml()
    assert sections["Recipe"].note == ""


def test_the_page_of_a_recipe_with_a_vocabulary_is_short_and_says_so():
    recipe = load_recipe("clip-tiny")
    tokenizer = recipe.encoders["text"].model.tokenizer
    merges = "\n".join(f"a b{i}" for i in range(4000))
    section = recipe_section(recipe.with_tokenizer("text", tokenizer.model_copy(update={"merges": merges})))
    page = yaml.safe_load(section.text)
    assert page["towers"]["text"]["model"]["tokenizer"]["merges"].endswith("and 3,997 more of 4,000 lines")
    assert len(section.text.splitlines()) == len(recipe.as_yaml().splitlines())
    assert "config.yaml" in section.note
