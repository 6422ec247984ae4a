"""Effective rank and deviation against what they are by hand, and features caught in the steps of real objectives."""

import numpy as np
import pytest
import torch
from health_runs import lines_of
from torch import nn

from mmssl.contracts import Step
from mmssl.distributed import Council, World
from mmssl.health import MOST, Features, deviation, effective_rank
from mmssl.launch import run
from tasks.build import build_objective, load_recipe, sizes_of, synthetic


def directions(count, n=200, dim=32, seed=0):
    """Vectors that spread evenly in ``count`` orthogonal directions, around a mean that is none of them."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    x = torch.randn(n, count, generator=generator)
    x = torch.linalg.qr(x - x.mean(0))[0]
    return x @ q[:count] + 3 * q[-1]


@pytest.mark.parametrize("count", [1, 2, 5, 30])
def test_even_directions_are_counted(count):
    vectors = directions(count)
    assert effective_rank(vectors) == pytest.approx(count, rel=1e-4)
    assert effective_rank(100 * vectors - 7) == pytest.approx(count, rel=1e-4)
    assert effective_rank(vectors[:, torch.randperm(32)]) == pytest.approx(count, rel=1e-4)


def test_uneven_directions_count_less_and_the_formula_is_roys():
    x = torch.randn(50, 80, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.01, 3, 80)
    values = np.linalg.svd(x.double().numpy() - x.double().numpy().mean(0), compute_uv=False)
    share = values[values > 1e-9] / values.sum()
    assert effective_rank(x) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)
    assert effective_rank(x) < 49


def test_equal_vectors_have_no_direction_and_no_deviation():
    for constant in (torch.full((20, 8), 0.1), torch.zeros(20, 8)):
        assert effective_rank(constant) == 0
        assert deviation(constant) == pytest.approx(0, abs=1e-9)
    noisy = torch.ones(64, 32) + 1e-3 * torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    assert deviation(noisy) < 0.002


def test_even_vectors_deviate_by_one_whatever_their_lengths():
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert deviation(x) == pytest.approx(1, rel=0.01)
    assert deviation(x * torch.rand(4000, 1)) == pytest.approx(1, rel=0.01)
    assert deviation(x + 5) < 0.3


def watched(objective, batches):
    """Run forward and backward passes of ``batches`` as one step, and return what was measured."""
    features = Features(objective, World(), Council(1), lambda done: done == 1)
    features.before(0)
    for batch in batches:
        objective(batch).loss.backward()
    features.after(1, batches)
    return dict(features.metrics)


def made(name, settings, count=6):
    recipe = load_recipe(name, settings)
    torch.manual_seed(0)
    objective = build_objective(recipe)
    one = synthetic(objective, sizes_of(recipe)[0], "cpu")
    batch = {key: torch.cat([value] * count) for key, value in one.items()}
    for key in objective.inputs:
        batch[key] = torch.randn(batch[key].shape, generator=torch.Generator().manual_seed(1))
    batch["index"] = torch.arange(count)
    if "text.signal" in batch:
        batch["text.signal"] = torch.randint(0, 500, batch["text.signal"].shape).float()
    return objective, batch


@pytest.mark.parametrize("kind", ["image", "pairs", "audio", "cpc", "clip"])
def test_the_features_are_what_the_encoder_gives(kind, materials):
    material = materials[kind]
    objective, batch = made(material.recipe, material.settings)
    objective.eval()
    found = watched(objective, [batch])
    encoders = objective.encoders()
    assert set(found) == {
        f"{'' if len(encoders) == 1 else f'{name}.'}health.{what}" for name in encoders for what in ("rank", "std")
    }
    for name, encoder in encoders.items():
        part = batch if len(encoders) == 1 else {
            key.removeprefix(f"{name}."): value for key, value in batch.items() if key.startswith(f"{name}.")
        }  # fmt: skip
        tokenizer = encoder.tokenizer
        pad, patches = tokenizer.pad(part), tokenizer.patches(part)
        latent = encoder(patches, part.get("keep"), batch.get("seed"), tokenizer.grid_of(part["signal"].shape[2:]), pad)
        kept = None if pad is None else pad if part.get("keep") is None else pad.gather(1, part["keep"])
        vectors = encoder.pool(latent, kept).detach()
        prefix = "" if len(encoders) == 1 else f"{name}."
        assert found[f"{prefix}health.rank"] == pytest.approx(effective_rank(vectors), rel=1e-4)
        assert found[f"{prefix}health.std"] == pytest.approx(deviation(vectors), rel=1e-4)


def test_an_encoder_of_embedded_patches_is_seen_where_it_gives_them():
    settings = {"signal.size": [32, 32], "model.backbone": {"dim": 8, "depth": 1}, "train.batch_size": 4}
    objective, batch = made("cpc-image-tiny", settings | {"signal.size": [96, 96]}, 4)
    (encoder,) = objective.encoders().values()
    assert encoder.output == "latent"
    objective.eval()
    found = watched(objective, [batch])
    vectors = encoder.pool(encoder(encoder.tokenizer.patches(batch))).detach()
    assert found["health.rank"] == pytest.approx(effective_rank(vectors), rel=1e-4)


def test_activation_checkpointing_counts_no_sample_twice(tiny_settings):
    tiny = {**tiny_settings, "model.backbone.drop_path": 0.0}
    objective, batch = made("image-mae-tiny", tiny)
    plain = watched(objective, [batch])
    objective, batch = made("image-mae-tiny", {**tiny, "model.backbone.checkpointing": True})
    assert watched(objective, [batch])["health.rank"] == pytest.approx(plain["health.rank"], rel=1e-5)


def test_micro_batches_are_seen_as_one_batch_and_the_first_samples_count(tiny_settings, monkeypatch):
    monkeypatch.setattr("mmssl.health.MOST", 4)
    objective, batch = made("image-mae-tiny", {**tiny_settings, "model.backbone.drop_path": 0.0})
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 3), slice(3, 6))]
    first = {key: value[:4] for key, value in batch.items()}
    whole = watched(objective, [first])
    assert watched(objective, halves)["health.rank"] == pytest.approx(whole["health.rank"], rel=1e-5)
    assert MOST == 256


class Absent(nn.Module):
    """Two encoders in name; of the second, some samples have nothing."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def encoders(self):
        return {"image": self.encoder}

    def forward(self, batch):
        loss = self.encoder(self.encoder.tokenizer.patches(batch)).sum()
        return Step(loss, {})


def test_what_a_sample_lacks_is_not_measured(tiny_encoder):
    objective = Absent(tiny_encoder())
    signal = torch.randn(6, 3, 16, 16)
    signal[3:] = 100.0
    present = torch.arange(6) < 3
    batch = {"signal": signal, "index": torch.arange(6), "image.present": present}
    found = watched(objective, [batch])
    three = watched(objective, [{"signal": signal[:3], "index": torch.arange(3)}])
    assert found["health.rank"] == pytest.approx(three["health.rank"], rel=1e-5)


def test_other_steps_are_left_alone(tiny_settings):
    objective, batch = made("image-mae-tiny", tiny_settings)
    features = Features(objective, World(), Council(1), lambda done: done == 2)
    features.before(0)
    objective(batch)
    features.after(1, [batch])
    assert features.metrics == {}
    assert not features._seen


def test_compiled_objectives_are_seen_too_and_change_nothing(tiny_settings):
    settings = {**tiny_settings, "model.backbone.drop_path": 0.0}
    objective, batch = made("image-mae-tiny", settings)
    plain = watched(objective, [batch])
    compiled, _ = made("image-mae-tiny", settings)
    features = Features(compiled, World(), Council(1), lambda done: done != 2)
    compiled.compile(backend="eager")
    for step in range(3):
        features.before(step)
        loss = compiled(batch).loss
        features.after(step + 1, [batch])
        assert features.metrics["health.rank"] == pytest.approx(plain["health.rank"], rel=1e-5)
        torch.testing.assert_close(loss, objective(batch).loss)


@pytest.mark.distributed
@pytest.mark.parametrize(("kind", "config"), [("image", "zero3"), ("clip", "zero2")])
def test_the_numbers_do_not_depend_on_the_ranks(kind, config, materials, tmp_path):
    recipe, data, settings = materials[kind]
    settings = {**settings, "train.steps": 2, "train.batch_size": 8}
    alone = lines_of(recipe, str(data), str(tmp_path / "one"), settings, None)
    two = run(lines_of, (recipe, str(data), str(tmp_path / "two"), {**settings, "train.accumulate": 1}, config), 2)[0]
    assert len(alone) == len(two) == 2
    for one, other in zip(alone, two, strict=True):
        names = {name for name in one if "health" in name or name in ("trivial", "grad_norm")}
        assert any("health.rank" in name for name in names)
        assert names <= set(other)
        for name in names:
            assert other[name] == pytest.approx(one[name], rel=2e-3), name
