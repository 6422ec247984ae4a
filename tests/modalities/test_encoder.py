"""Encoder folders: what is written is what is read, and everything else is a sentence."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch

from mmssl.errors import UnusableData, UserError
from modalities.encoder import load


@pytest.fixture
def folder(tiny_encoder, tmp_path):
    tiny_encoder(size=(16, 24)).eval().save(tmp_path / "encoder")
    return tmp_path / "encoder"


def test_a_saved_encoder_embeds_alike(tiny_encoder, folder, tmp_path):
    encoder = tiny_encoder(size=(16, 24))
    encoder.save(tmp_path / "other")
    x = torch.randn(5, 3, 16, 24)
    again = load(tmp_path / "other")
    assert torch.equal(again.embed(x), encoder.embed(x))
    assert again.fingerprint() == encoder.fingerprint() != load(folder).fingerprint()
    assert again.modality == "image"
    assert again.preprocess["size"] == [16, 24]


def test_files_pictures_and_tensors_give_the_same_vectors(folder, photos):
    encoder = load(folder)
    paths = sorted(photos.rglob("*.png"))[:3]
    vectors = encoder.embed(paths, batch_size=2)
    assert vectors.shape == (3, 32)
    assert vectors.dtype == torch.float32
    pictures = [PIL.Image.open(path).convert("RGB") for path in paths]
    assert torch.allclose(encoder.embed(pictures), vectors, atol=1e-6)
    tensors = torch.stack([encoder.transform(picture) for picture in pictures])
    assert torch.allclose(encoder.embed(tensors), vectors, atol=1e-6)
    assert torch.allclose(encoder.embed(str(paths[0])), vectors[:1], atol=1e-6)
    assert encoder.embed([]).shape == (0, 32)


def test_tokens_come_with_their_grid_and_pool_to_the_vector(folder):
    encoder = load(folder)
    x = torch.randn(2, 3, 16, 24)
    tokens, grid = encoder.tokens(x)
    assert grid == (4, 6)
    assert tokens.shape == (2, 24, 32)
    assert torch.allclose(tokens.mean(1), encoder.embed(x), atol=1e-6)


def test_other_sizes_than_the_trained_one_are_embedded(folder):
    encoder = load(folder)
    tokens, grid = encoder.tokens(torch.randn(1, 3, 32, 8))
    assert (grid, tokens.shape[1]) == ((8, 2), 16)
    assert torch.isfinite(encoder.embed(torch.randn(1, 3, 32, 8))).all()


def test_embedding_does_not_leave_training_mode_or_gradients(tiny_encoder):
    encoder = tiny_encoder(drop_path=0.5).train()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(encoder.embed(x), encoder.embed(x))
    assert encoder.training
    assert not encoder.embed(x).requires_grad


def test_a_file_that_cannot_be_read_is_named(folder, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UnusableData, match=r"a\.png"):
        load(folder).embed([tmp_path / "a.png"])


def test_a_run_a_file_and_a_folder_all_mean_the_encoder(folder):
    for path in (folder, folder / "model.safetensors", folder.parent):
        assert load(path).dim == 32


def test_what_is_not_an_encoder_is_a_sentence(folder, tmp_path):
    with pytest.raises(UserError, match="does not exist; did you mean 'encoder'"):
        load(tmp_path / "encodr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither an encoder folder nor a run"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "config.yaml").write_text("modality: image")
    with pytest.raises(UserError, match="no encoder yet"):
        load(tmp_path / "empty")
    shutil.copytree(folder, tmp_path / "encoder-b")
    with pytest.raises(UserError, match="holds 2 encoders"):
        load(tmp_path)


def test_a_damaged_encoder_is_a_sentence(folder, tmp_path):
    damaged = shutil.copytree(folder, tmp_path / "damaged" / "encoder")
    (damaged / "model.safetensors").write_bytes(b"\x00" * 50)
    with pytest.raises(UserError, match="not a readable encoder folder"):
        load(damaged)
    config = json.loads((folder / "config.json").read_text())
    for change, words in (({"format": 99}, "format 99"), ({"modality": "smell"}, "not a modality")):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=words):
            load(folder)
    config["model"]["backbone"]["depth"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="do not fit"):
        load(folder)


@torch.no_grad()
def test_views_of_a_file_go_through_a_few_at_a_time(monkeypatch, tiny_encoder):
    encoder, views, seen = tiny_encoder().eval(), torch.randn(2, 5, 3, 16, 16), []
    encoder.backbone.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    whole = encoder.features(views)
    assert seen == [10]
    monkeypatch.setattr("modalities.encoder.BATCH_VALUES", 4 * 3 * 16 * 16)
    torch.testing.assert_close(encoder.features(views), whole)
    assert seen == [10, 4, 4, 2]
    assert encoder.batch_size == 4


def test_nothing_in_the_folder_is_a_pickle(folder):
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors", "config.json", "preprocess.json", "README.md",
    }  # fmt: skip
    assert np.all([b"\x80\x04" not in path.read_bytes()[:4] for path in folder.iterdir()])


def test_one_input_of_any_kind_is_enough(folder):
    encoder = load(folder)
    picture = PIL.Image.effect_noise((20, 30), 80).convert("RGB")
    alone = encoder.embed(picture)
    assert torch.equal(alone, encoder.embed([picture]))
    assert torch.allclose(encoder.embed(encoder.transform(picture)), alone, atol=1e-6)
    with pytest.raises(ValueError, match="preprocessed float signal"):
        encoder.embed(torch.zeros(2, 3, 16, 24, dtype=torch.uint8))
    with pytest.raises(ValueError, match="batch_size"):
        encoder.embed([picture], batch_size=0)


def test_settings_that_do_not_go_together_are_a_sentence(folder):
    config = json.loads((folder / "config.json").read_text())
    for change in ({"cls_token": False, "pool": "cls"}, {"tokenizer": {"patch_size": [5, 4]}}):
        (folder / "config.json").write_text(json.dumps({**config, "model": {**config["model"], **change}}))
        with pytest.raises(UserError, match=r"cls_token|multiple of patch size"):
            load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="not a mapping"):
        load(folder)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_an_opened_picture_of_any_mode_is_embedded(folder, mode):
    picture = PIL.Image.effect_noise((20, 30), 80).convert("RGB").convert(mode)
    assert load(folder).embed([picture]).shape == (1, 32)


@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_read_at_another_size_positions_are_those_of_the_encoders_own(tmp_path, tiny_encoder, positions):
    encoder = tiny_encoder(positions=positions).eval()
    encoder.save(tmp_path / "encoder")
    wide = load(tmp_path / "encoder", {"size": [16, 32]})
    signal = torch.randn(2, 3, 16, 32)
    assert wide.tokenizer.grid == (4, 8)
    torch.testing.assert_close(wide.features(signal), encoder.features(signal), atol=0, rtol=0)
    whole = wide.layers({"signal": signal})[-1]
    patches = wide.tokenizer.patches({"signal": signal})
    torch.testing.assert_close(wide(patches), whole)  # its own grid is what is meant where none is given
