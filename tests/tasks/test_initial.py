"""Starting from other weights: across sizes and tasks, with every tensor accounted for."""

import pytest
import torch

from mmssl.backbones.positions import resize_table
from mmssl.errors import UserError
from mmssl.heads.classifier import HeadConfig
from mmssl.objectives.classify import ClassifyConfig
from tasks.initial import Weights, collapsed, read_weights, take


def classifier(encoder):
    return ClassifyConfig(classes=["a", "b"], head=HeadConfig()).build({"image": encoder})


def weights_of(objective):
    state = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    return Weights(state, "runs/a", {"encoder.": objective.encoder.tokenizer.grid})


def test_from_a_pretrained_objective_to_another_task(tiny_mae, tiny_encoder):
    source = weights_of(tiny_mae())
    target = classifier(tiny_encoder())
    taken = take(target, source)
    state = target.state_dict()
    for name in taken.copied:
        assert torch.equal(state[name], source.tensors[name])
    encoder = [name for name in state if name.startswith("encoder.")]
    assert sorted(taken.copied) == sorted(encoder)
    assert all(name.startswith("decoder.") for name in taken.unknown)
    assert all(name.startswith("head.") for name in taken.fresh)
    assert len(taken.copied) + len(taken.unknown) == len(source.tensors)
    said = str(taken)
    assert f"{len(encoder)} of the {len(source.tensors)} tensors in runs/a are used" in said
    assert f"not part of this model: decoder.* ({len(taken.unknown)})" in said
    assert f"initialised at random: head.* ({len(taken.fresh)})" in said


def test_learned_positions_are_resized_to_another_size(tiny_mae, tiny_encoder):
    source = weights_of(tiny_mae(positions="learned"))
    target = classifier(tiny_encoder(size=(24, 16), positions="learned"))
    taken = take(target, source)
    (name,) = taken.resized
    expected = resize_table(source.tensors[name], (4, 4), (6, 4))
    assert torch.equal(target.state_dict()[name], expected)
    assert f"resized: {name}" in str(taken)
    assert not taken.misfits


def test_another_patch_size_keeps_the_blocks_and_names_the_rest(tiny_mae, tiny_encoder):
    source = weights_of(tiny_mae())
    target = classifier(tiny_encoder(patch_size=(8, 8)))
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    taken = take(target, source)
    assert taken.misfits == ["encoder._tokenizer.proj.weight"]
    assert torch.equal(target.state_dict()[taken.misfits[0]], before[taken.misfits[0]])
    assert "of another shape and not used: encoder._tokenizer.proj.weight" in str(taken)
    assert "encoder._tokenizer.proj.weight" in str(taken).split("initialised at random: ")[1]


def test_a_deeper_model_takes_the_blocks_there_are(tiny_mae, tiny_encoder):
    source = weights_of(tiny_mae())
    taken = take(classifier(tiny_encoder(depth=3)), source)
    assert any(".blocks.1." in name for name in taken.copied)
    assert any(".blocks.2." in name for name in taken.fresh)
    assert "encoder.backbone.blocks.2.*" in str(taken)


def test_another_backbone_is_refused_with_an_example(tiny_mae, tiny_encoder):
    source = weights_of(tiny_mae())
    with pytest.raises(UserError, match=r"no weight of runs/a fits.*\[.*32.*\] there and \[.*64.*\] here"):
        take(classifier(tiny_encoder(dim=64)), source)


def test_a_path_that_holds_no_weights(tmp_path):
    with pytest.raises(UserError, match="neither an encoder folder nor a run"):
        read_weights(tmp_path)


def test_names_collapse_to_whole_branches_only():
    every = ["a.x", "a.y", "b.c.x", "b.c.y", "b.d", "e"]
    assert collapsed(["a.x", "a.y", "e"], every) == ["a.* (2)", "e"]
    assert collapsed(["a.x", "b.c.x", "b.c.y"], every) == ["a.x", "b.c.* (2)"]
    assert collapsed(every, every) == ["a.* (2)", "b.* (3)", "e"]
