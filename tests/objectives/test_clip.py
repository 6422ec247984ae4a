"""CLIP: transformers' model with all weights, its temperature, chunks, missing modalities, locked towers and ranks.

Planted bugs that fail here: ``present`` ignored, seeds counted from a chunk's first, no clamp, a clamp from which the
temperature does not come back, a parameter without an axis, the share of a rank without the number of ranks, a locked
tower left in training, padding pooled, no norm before the first block, rotated texts.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from clip_ranks import (
    BATCH,
    CASES,
    END,
    PRESENT,
    START,
    TRAINED,
    VOCABULARY,
    draw,
    everything,
    gradients,
    make,
    objective_and_optimizer,
    series,
    walk,
    widened,
    with_missing,
)
from ranks import on_ranks
from torch import nn
from transformers import CLIPConfig, CLIPModel

from mmssl.cost import footprint
from mmssl.engine.optim import adamw, param_groups
from mmssl.engine.torch_engine import TorchEngine
from mmssl.errors import UserError
from mmssl.objectives.clip import MAX_SCALE, Temperature

PAIR = ("image", "text")
THREE = ("image", "text", "audio")


def assert_same(found, expected, **how):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **how)


# --- transformers -----------------------------------------------------------------------------------------------------

RENAMES = {
    "vision_model.embeddings.class_embedding": "towers.image.cls_token",
    "vision_model.embeddings.patch_embedding.": "towers.image._tokenizer.proj.",
    "vision_model.embeddings.position_embedding.weight": "towers.image._tokenizer.positions.table",
    "vision_model.pre_layrnorm.": "towers.image.backbone.pre_norm.",
    "vision_model.encoder.layers.": "towers.image.backbone.blocks.",
    "vision_model.post_layernorm.": "towers.image.backbone.norm.",
    "text_model.embeddings.token_embedding.": "towers.text._tokenizer.words.",
    "text_model.embeddings.position_embedding.weight": "towers.text._tokenizer.positions.table",
    "text_model.encoder.layers.": "towers.text.backbone.blocks.",
    "text_model.final_layer_norm.": "towers.text.backbone.norm.",
    "visual_projection.": "projections.image.",
    "text_projection.": "projections.text.",
    "logit_scale": "temperature.log_scale",
    "layer_norm": "norm",
}


def translate(theirs):
    """Return transformers' tensors, weights or gradients, under our names and in our layout.

    Queries, keys and values are fused, and the patch convolution becomes a linear layer over (p, q, C). The position
    of their class token is ours of no token, for one vector is as good as two that are added: it is left out.
    """
    ours = {}
    for name, tensor in theirs.items():
        for old, new in RENAMES.items():
            name = name.replace(old, new)
        inside = "self_attn." if "image" not in name else "self_attn"
        ours[name.replace(inside, "" if "image" not in name else "attn").replace("out_proj", "proj")] = tensor
    for name in [name for name in ours if "q_proj." in name]:
        parts = [ours.pop(name.replace("q_proj.", f"{part}_proj.")) for part in "qkv"]
        ours[name.replace("q_proj.", "qkv.")] = torch.cat(parts)
    patches = "towers.image._tokenizer.proj.weight"
    ours[patches] = ours[patches].permute(0, 2, 3, 1).flatten(1)
    positions = "towers.image._tokenizer.positions.table"
    ours[positions] = ours[positions][1:]
    ours["temperature.log_scale"] = ours["temperature.log_scale"].reshape(1)
    return ours


@pytest.fixture(scope="module")
def theirs():
    """A tiny CLIPModel, with weights that are far from where they start."""
    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"}
    model = CLIPModel(
        CLIPConfig(
            text_config={
                **small, "vocab_size": VOCABULARY, "hidden_size": 12, "intermediate_size": 48, "layer_norm_eps": 1e-5,
                "max_position_embeddings": 8, "bos_token_id": START, "eos_token_id": END,
            },
            vision_config={
                **small, "hidden_size": 16, "intermediate_size": 64, "image_size": 16, "patch_size": 8,
                "layer_norm_eps": 1e-6,
            },
            projection_dim=8,
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter += 0.2 * torch.randn_like(parameter)
        model.vision_model.embeddings.position_embedding.weight[0] = 0
    return model.train()


@pytest.fixture
def ours(theirs):
    """Our CLIP with their weights: every one of theirs is used, and of ours all but the bias of patches."""
    made = make(*PAIR)
    weights = {name: tensor.detach() for name, tensor in translate(dict(theirs.named_parameters())).items()}
    found = made.load_state_dict(weights, strict=False)
    assert found.unexpected_keys == []
    assert found.missing_keys == ["towers.image._tokenizer.proj.bias"]
    nn.init.zeros_(made.towers["image"]._tokenizer.proj.bias)
    return made


def test_it_is_transformers_clip_forwards_and_backwards(theirs, ours):
    batch = draw(*PAIR)
    signal = batch["text.signal"][:, 0].long()
    theirs.zero_grad()
    out = theirs(
        input_ids=(signal - 1).clamp(min=0),
        attention_mask=(signal > 0).long(),
        pixel_values=batch["image.signal"],
        return_loss=True,
    )
    out.loss.backward()
    torch.testing.assert_close(ours.features("image", batch), out.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.features("text", batch), out.text_embeds, atol=1e-5, rtol=0)
    found = gradients(ours, batch)
    torch.testing.assert_close(found.pop("loss"), out.loss.detach(), atol=1e-5, rtol=0)
    best = torch.eye(BATCH)[out.logits_per_text.argmax(1)].diagonal().mean()
    assert found.pop("metrics/accuracy_text_to_image") == pytest.approx(best)
    best = torch.eye(BATCH)[out.logits_per_image.argmax(1)].diagonal().mean()
    assert found.pop("metrics/accuracy_image_to_text") == pytest.approx(best)
    assert found.pop("metrics/scale") == pytest.approx(1 / 0.07, rel=1e-4)
    assert found.pop("metrics/scale_most") == MAX_SCALE
    assert found.pop("metrics/trivial") == pytest.approx(math.log(BATCH))
    bias = found.pop("towers.image._tokenizer.proj.bias")
    torch.testing.assert_close(bias, found["towers.image._tokenizer.positions.table"].sum(0), atol=1e-5, rtol=1e-4)
    expected = translate({name: p.grad for name, p in theirs.named_parameters()})
    assert all(gradient.abs().max() > 1e-4 for name, gradient in expected.items() if "k_proj.bias" not in name)
    assert_same(found, expected, atol=1e-5, rtol=1e-4)


def test_the_sigmoid_loss_is_siglips():
    clip, batch = make(*PAIR, loss="sigmoid"), draw(*PAIR)
    assert clip.temperature.scale().item() == pytest.approx(10)
    a, b = (clip.features(name, batch) for name in PAIR)
    logits = 10 * a @ b.T - 10
    expected = -F.logsigmoid((2 * torch.eye(BATCH) - 1) * logits).sum(1).mean()  # equation 1 of arXiv:2303.15343
    torch.testing.assert_close(clip(batch).loss, expected, atol=1e-5, rtol=1e-5)
    assert gradients(clip, batch)["temperature.offset"].abs() > 1e-4


# --- temperature ------------------------------------------------------------------------------------------------------


def test_the_temperature_begins_where_the_papers_do():
    assert make(*PAIR).temperature.scale().item() == pytest.approx(1 / 0.07)
    assert make(*PAIR).temperature.bias is None
    sigmoid = make(*PAIR, loss="sigmoid").temperature
    assert (sigmoid.scale().item(), sigmoid.bias.item()) == (pytest.approx(10), -10)
    assert make(*PAIR, temperature=0.5).temperature.scale().item() == pytest.approx(2)


@pytest.mark.parametrize("beyond", [0.0, 1.0])
def test_the_scale_stays_at_100_and_comes_back(beyond):
    temperature = Temperature(0.07)
    with torch.no_grad():
        temperature.log_scale.fill_(math.log(MAX_SCALE) + beyond)
    assert temperature.scale().item() == pytest.approx(100, rel=1e-5)
    for sign, moves in ((-1, False), (1, True)):  # downhill is a higher scale, and then a lower one
        temperature.zero_grad()
        (sign * temperature.scale()).backward()
        assert bool(temperature.log_scale.grad) == moves
    optimizer = torch.optim.SGD(temperature.parameters(), lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        temperature.scale().backward()
        optimizer.step()
    assert temperature.scale() < 99


def test_within_its_bounds_the_temperature_has_the_gradient_of_an_exponential():
    temperature = Temperature(0.07)
    temperature.scale().backward()
    assert temperature.log_scale.grad.item() == pytest.approx(1 / 0.07, rel=1e-5)


def test_temperature_and_bias_do_not_decay():
    clip = make(*PAIR, loss="sigmoid")
    decay = {id(p): group["weight_decay"] for group in param_groups(clip, 0.2) for p in group["params"]}
    assert decay[id(clip.temperature.log_scale)] == decay[id(clip.temperature.offset)] == 0
    assert decay[id(clip.projections["image"].weight)] == 0.2
    assert len(decay) == len(list(clip.parameters()))


# --- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4, 5, 6])
@pytest.mark.parametrize("names", [PAIR, THREE])
def test_chunks_change_nothing_but_memory(chunk, names):
    batch = with_missing(draw(*names)) if names == THREE else draw(*names)
    plain, chunked = (gradients(*widened(make(*names, drop_path=0.5, chunk=size), batch)) for size in (None, chunk))
    assert_same(chunked, plain, atol=1e-12, rtol=1e-10)
    still = gradients(*widened(make(*names, drop_path=0.0), batch))
    assert not torch.allclose(still["loss"], plain["loss"], atol=1e-4)  # stochastic depth was at work


def test_a_chunked_step_needs_the_activations_of_a_chunk():
    one = draw(*PAIR, count=1)
    feet = [footprint(make(*PAIR, chunk=chunk), one, 64) for chunk in (None, 8)]
    assert feet[1].activations < feet[0].activations / 4
    assert feet[1].peak() < feet[0].peak() / 4


# --- what must not matter ---------------------------------------------------------------------------------------------


def test_the_order_of_a_batch_changes_nothing():
    clip, batch = make(*THREE, drop_path=0.3), with_missing(draw(*THREE))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = {key: value[order] for key, value in batch.items()}
    assert_same(gradients(clip, moved), gradients(clip, batch), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_what_stands_in_for_a_missing_modality_is_never_seen(loss, value):
    clip, batch = make(*THREE, loss=loss), with_missing(draw(*THREE))
    expected = gradients(clip, batch)
    spoilt = {key: tensor.clone() for key, tensor in batch.items()}
    spoilt["audio.signal"][~spoilt["audio.present"]] = value
    spoilt["audio.length"][~spoilt["audio.present"]] = 0
    found = gradients(clip, spoilt)
    assert_same(found, expected, atol=1e-6, rtol=1e-4)


def test_pairs_that_are_not_all_there_are_those_that_are():
    clip, batch = make("image", "audio"), draw("image", "audio")
    there = torch.tensor(PRESENT["audio"])
    part = gradients(clip, {key: value[there] for key, value in batch.items()})
    assert_same(gradients(clip, batch | {"audio.present": there}), part, atol=1e-6, rtol=1e-4)
    both = batch | {"audio.present": there | ~there, "image.present": there}
    assert_same(gradients(clip, both), part, atol=1e-6, rtol=1e-4)


def test_a_batch_without_a_pair_teaches_nothing_and_is_finite():
    found = gradients(make("image", "audio"), draw("image", "audio") | {"audio.present": torch.zeros(BATCH) > 0})
    assert all(torch.isfinite(value).all() for value in found.values())
    assert found["loss"] == 0
    assert not any(value.any() for name, value in found.items() if not name.startswith("metrics"))


def test_of_three_towers_it_is_the_mean_of_the_centres_pairs():
    clip, batch = make(*THREE), with_missing(draw(*THREE))
    step = clip(batch)
    singly = []
    for other in THREE[1:]:
        pair = make("image", other)
        pair.load_state_dict({name: v for name, v in clip.state_dict().items() if name in pair.state_dict()})
        singly.append(pair(batch | {"seed": batch["seed"]}))
        torch.testing.assert_close(step.metrics[f"loss_image_{other}"], singly[-1].loss.detach())
        for key in (f"accuracy_image_to_{other}", f"accuracy_{other}_to_image"):
            torch.testing.assert_close(step.metrics[key], singly[-1].metrics[key])
    torch.testing.assert_close(step.loss, (singly[0].loss + singly[1].loss) / 2)
    assert not any("text_to_audio" in key for key in step.metrics)


# --- locked towers, a space without a projection ----------------------------------------------------------------------


def test_a_locked_tower_stays_as_it_was():
    clip = make(*PAIR, locked=["image"], drop_path=0.5, chunk=4)
    assert clip.train().towers["text"].training
    assert not clip.towers["image"].training
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    optimizer = adamw(param_groups(clip, 0.2), (0.9, 0.98), 1e-6)
    for seed in range(2):
        found = gradients(clip, draw(*PAIR, seed=seed))
        assert not any(name.startswith("towers.image") for name in found)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
    after = clip.state_dict()
    moved = {name.rpartition("backbone")[0] or name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("towers.image") for name in moved)
    assert {"towers.text.", "projections.image.weight", "projections.text.weight"} <= moved
    batch = draw(*PAIR)
    assert torch.equal(clip.features("image", batch), clip.features("image", batch | {"seed": batch["seed"] + 1}))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"locked": ["imge"]}, "objective.locked: 'imge' is not one of the towers; did you mean 'image'"),
        ({"locked": ["image", "text"]}, "objective.locked names all towers"),
    ],
)
def test_what_cannot_be_locked_is_a_sentence(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        make(*PAIR, **settings)


def test_a_space_may_be_that_of_the_first_tower():
    clip, batch = make(*PAIR, dim=None), draw(*PAIR)
    assert isinstance(clip.projections["image"], nn.Identity)
    assert clip.projections["text"].weight.shape == (16, 12)
    tower = clip.towers["image"]
    latent = tower(tower.tokenizer.patches({"signal": batch["image.signal"]}))
    torch.testing.assert_close(clip.features("image", batch), F.normalize(tower.pool(latent), dim=1))
    kept = clip.kept()
    assert [kept[name].facts["projected"] for name in PAIR] == [False, True]
    assert {kept[name].facts["dim"] for name in PAIR} == {16}


# --- learning ---------------------------------------------------------------------------------------------------------

CONCEPTS = 8


def pairs(seed, count=32):
    """Return pictures of concepts, each a smooth pattern and noise of its own, and texts with the concept's word."""
    generator = torch.Generator().manual_seed(99)
    patterns = F.interpolate(torch.randn(CONCEPTS, 3, 4, 4, generator=generator), size=16, mode="bilinear")
    concept = torch.arange(count) % CONCEPTS
    batch = draw(*PAIR, count=count, seed=seed)
    batch["image.signal"] = patterns[concept] + 0.3 * batch["image.signal"]
    batch["text.signal"][:, 0, 1] = concept + 1.0
    return batch, concept


def test_it_learns_concepts_that_it_finds_again_in_new_pairs():
    clip = make(*PAIR)
    optimizer = torch.optim.Adam(clip.parameters(), 3e-3)
    for step in range(80):
        batch, _ = pairs(step, CONCEPTS)  # fresh noise and words, and each concept once
        optimizer.zero_grad()
        last = clip(batch)
        last.loss.backward()
        optimizer.step()
    assert last.metrics["accuracy_image_to_text"] > 0.9
    batch, concept = pairs(10_000)
    with torch.no_grad():
        a, b = (clip.eval().features(name, batch) for name in PAIR)
    found = concept[(a @ b.T).argmax(1)] == concept
    assert found.float().mean() > 0.9  # by chance 1 of 8


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks():
    """What two ranks found."""
    return on_ranks(everything)


@pytest.mark.distributed
def test_two_ranks_have_the_loss_and_gradients_of_one_process(two_ranks):
    one, two = ({name: value for name, value in found.items() if "series/" not in name} for found in two_ranks)
    whole = walk(0, 1)
    assert {name.partition("/")[0] for name in whole} == CASES.keys()
    assert_same(one, whole, atol=1e-5, rtol=1e-4)
    assert_same(two, one, atol=0, rtol=0)


@pytest.mark.distributed
@pytest.mark.parametrize("name", TRAINED)
def test_deepspeed_on_two_ranks_trains_as_one_process(two_ranks, name):
    objective, optimizer = objective_and_optimizer(TRAINED[name][-1])
    engine = TorchEngine(objective, optimizer, torch.device("cpu"), clip=None, ema=None)
    expected = series(engine, TRAINED[name][-1])
    assert max(expected) - min(expected) > 0.01
    torch.testing.assert_close(two_ranks[0][f"series/{name}"], torch.tensor(expected), atol=1e-5, rtol=0)
