"""Classification: what is trained and what is not, the losses against torch's formulas, and that shares add up."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmssl.config import validate
from mmssl.contracts import Keeps
from mmssl.engine.optim import adamw, param_groups
from mmssl.engine.torch_engine import TorchEngine
from mmssl.errors import UserError
from mmssl.mixing import MixConfig, MixDraw
from mmssl.objectives.classify import ClassifyConfig

CLASSES = ["a", "b", "c"]


@pytest.fixture
def classify(tiny_encoder):
    """Make the objective on an encoder of 2 blocks; keywords are those of its configuration."""

    def make(drop_path=0.0, **settings):
        torch.manual_seed(1)
        encoder = tiny_encoder(drop_path=drop_path)
        objective = ClassifyConfig(classes=CLASSES, **settings).build({"image": encoder})
        torch.nn.init.normal_(objective.head.linear.weight)  # far from a uniform guess
        return objective

    return make


def batch(count=8, mix=None, multi_label=False):
    rng = np.random.default_rng(0)
    made = {
        "signal": torch.from_numpy(rng.standard_normal((count, 3, 16, 16), dtype=np.float32)),
        "index": torch.arange(count),
        "seed": torch.arange(count) + 100,
        "target": torch.arange(count) % len(CLASSES),
    }
    if multi_label:
        made["target"] = torch.from_numpy(rng.integers(0, 2, (count, len(CLASSES)))).float()
    if mix is not None:
        rows = [MixDraw(mix, 2)(rng, (4, 4)) for _ in range(count)]
        made |= {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    return made


def halves(whole):
    return [{name: value.chunk(2)[i] for name, value in whole.items()} for i in (0, 1)]


@pytest.mark.parametrize(
    ("train_blocks", "trained"),
    [
        (0, {"head"}),
        (1, {"head", "encoder.backbone.blocks.1", "encoder.backbone.norm"}),
        (2, {"head", "encoder.backbone"}),
        (None, {"head", "encoder"}),
    ],
)
def test_gradients_are_where_something_is_trained_and_nowhere_else(classify, train_blocks, trained):
    objective = classify(train_blocks=train_blocks)
    objective(batch()).loss.backward()
    for name, parameter in objective.named_parameters():
        inside = any(name.startswith(f"{part}.") for part in trained)
        unused = name == "encoder.cls_token" and train_blocks is None and parameter.grad is not None
        assert (parameter.grad is not None) == inside or unused, name
        assert parameter.requires_grad == inside, name


def test_a_frozen_encoder_is_bitwise_the_same_after_training_and_keeps_no_graph(classify):
    objective = classify(drop_path=0.5, train_blocks=0)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    engine = TorchEngine(
        objective, adamw(param_groups(objective, 0.5), (0.9, 0.99), 1e-8), torch.device("cpu"), ema=0.5
    )
    for _ in range(3):
        engine.step([batch()], 0.1)
    for name, tensor in objective.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("encoder."), name
    averages = dict(zip(engine.names.values(), engine.ema.averages, strict=True))
    assert all(torch.equal(average, before[name]) for name, average in averages.items() if name.startswith("encoder."))
    seen = []
    for module in (objective.encoder.backbone.blocks[1], objective.head):
        module.register_forward_pre_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    objective(batch())
    assert seen == [False, True]


@pytest.mark.parametrize(("train_blocks", "drops"), [(0, set()), (1, {1}), (None, {0, 1})])
def test_what_is_frozen_stays_in_evaluation_mode(classify, train_blocks, drops):
    objective = classify(train_blocks=train_blocks)
    for _ in range(2):
        assert {i for i, block in enumerate(objective.encoder.backbone.blocks) if block.training} == drops
        assert objective.head.training
        objective.eval()
        assert not any(module.training for module in objective.modules())
        objective.train()


def test_stochastic_depth_is_off_in_a_frozen_encoder_and_on_in_a_trained_one(classify):
    for train_blocks, same in ((0, True), (None, False)):
        objective = classify(drop_path=0.9, train_blocks=train_blocks)
        trained = objective.logits(batch())
        assert torch.allclose(trained, objective.eval().logits(batch())) == same


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_torchs_but_for_the_constant(classify, smoothing):
    weights = [0.5, 1.0, 4.0]
    objective, whole = classify(class_weights=weights, label_smoothing=smoothing), batch()
    logits, table = objective.logits(whole), torch.tensor(weights)
    theirs = F.cross_entropy(logits, whole["target"], table, label_smoothing=smoothing)
    share = table[whole["target"]].sum() / len(logits)  # torch divides by the batch's weights, we by its size
    torch.testing.assert_close(objective(whole).loss, theirs * share)
    assert "weights" not in objective.state_dict()


def test_weighted_losses_of_micro_batches_add_up(classify):
    objective, whole = classify(class_weights=[0.5, 1.0, 4.0], label_smoothing=0.1), batch()
    parts = [objective(part).loss for part in halves(whole)]
    torch.testing.assert_close(objective(whole).loss, torch.stack(parts).mean())


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("mix", [MixConfig(mixup=0.8), MixConfig(cutmix=1.0), MixConfig(mixup=0.8, cutmix=1.0)])
def test_mixing_gives_the_loss_of_the_mixed_target_however_the_batch_is_cut(classify, mix, multi_label):
    objective = classify(mix=mix, multi_label=multi_label, label_smoothing=0.1)
    whole = batch(mix=mix, multi_label=multi_label)
    step = objective(whole)
    parts = [objective(part).loss for part in halves(whole)]
    torch.testing.assert_close(step.loss, torch.stack(parts).mean())

    from mmssl.mixing import mix as blend

    signal, own = blend(whole["signal"], whole["mix_weight"], whole["mix_box"])
    logits = objective.logits({**whole, "signal": signal})
    hot = whole["target"] if multi_label else F.one_hot(whole["target"], 3).float()
    other = hot[torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])]
    target = own[:, None] * hot + (1 - own[:, None]) * other
    if multi_label:
        expected = F.binary_cross_entropy_with_logits(logits, target * 0.9 + 0.05)
    else:
        expected = F.cross_entropy(logits, target, label_smoothing=0.1)
        assert step.metrics["accuracy"] == (logits.argmax(1) == whole["target"]).float().mean()
    torch.testing.assert_close(step.loss, expected)
    assert not torch.allclose(step.loss, objective.eval()(whole).loss)


def test_evaluation_never_mixes(classify):
    mixing, plain = classify(mix=MixConfig(mixup=0.8)), classify()
    assert plain.draw() is None
    assert mixing.draw() is not None
    torch.testing.assert_close(mixing.eval()(batch(count=3)).loss, plain.eval()(batch(count=3)).loss)


def test_several_labels_are_one_decision_per_class(classify):
    objective, whole = classify(multi_label=True), batch(multi_label=True)
    logits = objective.logits(whole).double()
    right = torch.where(whole["target"] == 1, logits.sigmoid(), 1 - logits.sigmoid())
    assert objective(whole).loss.item() == pytest.approx(-right.log().mean().item(), rel=1e-5)
    assert objective(whole).metrics == {}
    index = batch()  # a class index is a single positive
    hot = {**index, "target": F.one_hot(index["target"], 3).float()}
    assert torch.equal(objective(index).loss, objective(hot).loss)


def test_the_classifier_is_told_with_what_it_takes_to_make_it_again(classify):
    objective = classify(multi_label=True)
    assert isinstance(objective, Keeps)
    (name, head, facts) = objective.kept()["image"]
    assert name == "classifier"
    assert head is objective.head
    again = ClassifyConfig(**facts)
    assert (again.classes, again.multi_label) == (CLASSES, True)
    assert again.head == ClassifyConfig().head


def test_a_uniform_guess_costs_log_classes(tiny_encoder):
    objective = ClassifyConfig(classes=CLASSES).build({"image": tiny_encoder()})
    assert objective(batch()).loss.item() == pytest.approx(math.log(3), abs=0.1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"class_weights": [1.0, 2.0]}, "class_weights has 2 numbers for 3 classes"),
        ({"class_weights": "balancd"}, "did you mean 'balanced'"),
        ({"class_weights": [1, 2, 0]}, "greater than 0"),
        ({"class_weights": [1, 2, 3], "multi_label": True}, "one label per file"),
        ({"train_blocks": -1}, "train_blocks"),
        ({"mix": {"mixpu": 1}}, "did you mean 'mix.mixup'"),
    ],
)
def test_settings_that_cannot_be_are_one_sentence(settings, words):
    with pytest.raises(UserError, match=words):
        validate(ClassifyConfig, {"classes": CLASSES, **settings}, "test")


def test_settings_that_do_not_fit_the_encoder_are_refused(classify):
    with pytest.raises(ValueError, match="train_blocks is 3, but the encoder has 2 blocks"):
        classify(train_blocks=3)
    with pytest.raises(ValueError, match="'balanced' is for fine-tuning"):
        classify(class_weights="balanced")
