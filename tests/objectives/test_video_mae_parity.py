"""MAE on video equals transformers' VideoMAEForPreTraining: latent, prediction, loss and every gradient."""

import importlib
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DIM, DECODER_DIM = 32, 24


@pytest.fixture
def step(monkeypatch):
    """The step benchmark as a module: it holds the translation of transformers' VideoMAE weights into ours."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("video_mae_step")


@pytest.fixture
def shape(step):
    return step.Shape(frames=8, size=16, tube=(2, 4), encoder=(DIM, 2, 4), decoder=(DECODER_DIM, 2, 3))


def clips(least_contrast):
    """Noise whose brightness and contrast differ by row and colour; the last row of patches has the least contrast."""
    contrast = torch.rand(3, 3, 1, 16, 1) + 0.1
    contrast[:, :, :, 12:] = least_contrast
    return torch.randn(3, 3, 8, 16, 16) * contrast + torch.randn(3, 3, 1, 16, 1)


# In a flat patch eps is most of what it is divided by, which takes double precision to compare: theirs moves the signal
# to a scale of 0 to 1 first, and rounds there.
@pytest.mark.parametrize(("dtype", "least", "close"), [(torch.float32, 0.1, 1e-5), (torch.float64, 1e-5, 1e-6)])
def test_latent_prediction_loss_and_gradients_equal_transformers(step, shape, draw_batch, dtype, least, close):
    ours, theirs = (model.to(dtype) for model in step.build(shape))
    for name, parameter in theirs.named_parameters():  # biases, norms and the mask token must matter too
        norm = "norm" in name and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(norm), std=0.1)
    step.copy_weights(theirs, ours)
    signal = clips(least).to(dtype)
    batch = draw_batch(ours, signal)
    pixels, mask = signal.transpose(1, 2), step.hidden(batch, 64)

    tolerance = {"rtol": 0, "atol": close}
    latent = ours.encoder(ours.encoder.tokenizer.patches(batch), batch["keep"])
    torch.testing.assert_close(latent, theirs.videomae(pixels, mask).last_hidden_state, **tolerance)
    answer = theirs(pixels, mask)
    torch.testing.assert_close(ours.decoder(latent, batch["keep"], batch["drop"]), answer.logits, **tolerance)
    loss = ours(batch).loss
    torch.testing.assert_close(loss.to(dtype), answer.loss, **tolerance)  # ours is fp32 always

    loss.backward()
    answer.loss.backward()
    expected = step.translate({name: p.grad for name, p in step.trained(theirs).items()})
    for name, parameter in ours.named_parameters():
        if name == "decoder.embed.bias":  # theirs has none
            continue
        assert expected[name].abs().max() > 0, name
        # The bias of the keys, which theirs has not, shifts all scores of a query alike and so has no gradient.
        torch.testing.assert_close(parameter.grad, expected[name].view_as(parameter), **tolerance, msg=name)


def test_the_step_benchmark_runs_on_a_tiny_shape(step, shape, capsys):
    arguments = ["--batch-size", "2", "--repeats", "1", "--warmup", "1"]
    step.main([*arguments, "--json"], shape)
    result = json.loads(capsys.readouterr().out)
    assert result["loss"]["ours"] == pytest.approx(result["loss"]["transformers"], abs=1e-5)
    assert result["seconds"]["fp32"].keys() == {"ours", "transformers", step.HALF}
    step.main(arguments, shape)
    assert f"| fp32 | {step.HALF} |" in capsys.readouterr().out
