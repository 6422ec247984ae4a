"""MAE equals transformers' ViTMAEForPreTraining: latent, prediction, loss and every gradient, weights copied over."""

import json

import pytest
import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from mmssl.masking import gather

DIM, PATCH = 32, 4


def their_mae(size, norm_pix):
    config = ViTMAEConfig(
        image_size=size,
        patch_size=PATCH,
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=4 * DIM,
        decoder_hidden_size=DIM,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=4 * DIM,
        norm_pix_loss=norm_pix,
        layer_norm_eps=1e-6,
    )
    theirs = ViTMAEForPreTraining(config)
    for name, parameter in theirs.named_parameters():  # biases, norms and tokens must matter too
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=float("layernorm" in name), std=0.1)
    return theirs


def their_outputs(theirs, signal, noise, norm_pix):
    """Return latent, prediction and loss. Its own forward refuses pictures that are not square, so the parts are called
    here; on square ones the test compares with its own forward as well."""
    encoded = theirs.vit(signal, noise=noise)
    prediction = theirs.decoder(encoded.last_hidden_state, encoded.ids_restore).logits
    target = theirs.patchify(signal, interpolate_pos_encoding=True)  # the flag only switches the refusal off
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    per_patch = (prediction - target).square().mean(-1)
    return encoded.last_hidden_state, prediction, (per_patch * encoded.mask).sum() / encoded.mask.sum()


# transformers fills its tables for a square grid even where the picture is not, hence 16 tokens in both.
@pytest.mark.parametrize("size", [(16, 16), (8, 32)], ids=["square", "wide"])
@pytest.mark.parametrize("norm_pix", [True, False], ids=["normalized", "raw"])
def test_latent_prediction_loss_and_gradients_equal_transformers(mae_step, tiny_mae, draw_batch, size, norm_pix):
    theirs = their_mae(size, norm_pix)
    ours = tiny_mae(size=size, patch_size=(PATCH, PATCH), dim=DIM, target="normalized" if norm_pix else "raw")
    mae_step.copy_weights(theirs, ours)
    batch = draw_batch(ours, torch.randn(3, 3, *size))
    noise = mae_step.noise_of(batch["keep"], 16)

    latent, prediction, loss = their_outputs(theirs, batch["signal"], noise, norm_pix)
    if size[0] == size[1]:
        torch.testing.assert_close(theirs(batch["signal"], noise=noise).loss, loss)

    patches = ours.encoder.tokenizer.cut(batch["signal"])
    our_latent = ours.encoder(patches, batch["keep"])
    our_prediction = ours.decoder(our_latent, batch["keep"], batch["drop"])
    our_loss = ours(batch).loss
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(our_latent, latent, **close)
    torch.testing.assert_close(our_prediction, gather(prediction, batch["drop"]), **close)
    torch.testing.assert_close(our_loss, loss, **close)

    loss.backward()
    our_loss.backward()
    expected = mae_step.translate({name: p.grad for name, p in mae_step.trained(theirs).items()})
    for name, parameter in ours.named_parameters():
        assert expected[name].abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, expected[name].view_as(parameter), **close, msg=name)


def test_the_step_benchmark_runs_on_a_tiny_shape(mae_step, capsys):
    shape = mae_step.Shape(size=16, patch_size=4, encoder=(DIM, 2, 4), decoder=(DIM, 1, 4))
    arguments = ["--batch-size", "2", "--repeats", "1", "--warmup", "1"]
    mae_step.main([*arguments, "--json"], shape)
    result = json.loads(capsys.readouterr().out)
    assert result["loss"]["ours"] == pytest.approx(result["loss"]["transformers"], abs=1e-5)
    assert result["seconds"]["fp32"].keys() == {"ours", "transformers"}
    mae_step.main(arguments, shape)
    printed = capsys.readouterr().out
    assert "| fp32 | transformers |" in printed
    assert "| bf16 |" in printed
