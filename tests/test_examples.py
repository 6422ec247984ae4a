"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cpc_beside_a_recurrent_model_reaches_what_it_sees_and_remembers():
    module = example("cpc_auxiliary")
    seen, truth = module.sequences(6, torch.Generator().manual_seed(0))
    assert seen.shape == (6, module.STEPS, module.SENSORS)
    assert truth.shape == (6,)
    model = module.Watcher()
    head = module.ContrastivePrediction(48, 48, steps=3, negatives=module.NegativesConfig(count=None))
    torch.nn.init.normal_(head.predictor.project.weight)
    z, c, _ = model(seen)
    head(z, c).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in [*model.see.parameters()])
    assert all(p.grad.abs().sum() > 0 for p in model.remember.parameters())
    assert model.answer.weight.grad is None


def test_the_auxiliary_loss_changes_what_is_learned():
    module, few = example("cpc_auxiliary"), {"steps": 25, "labelled": 16, "batch_size": 8, "others": 1000}
    alone, beside = (module.train(weight, **few) for weight in (0.0, 1.0))
    assert 0 < alone < 1
    assert 0 < beside < 1
    assert alone != beside
    assert alone == module.train(0.0, **few)
