"""FLOPs against a count by hand; planned memory against what autograd and the allocator of real tensors really hold."""

import dataclasses

import pytest
import torch
from torch import nn

from mmssl.contracts import Step
from mmssl.cost import Footprint, Memory, Sharding, footprint, measure, plan, sample_batch, trace
from mmssl.engine.deepspeed_setup import system_config
from mmssl.errors import UserError
from tasks.build import build_objective, load_recipe, measure_cost, measure_memory, sketch_objective, synthetic
from tasks.plan_rows import CONFIGS
from tasks.pretrain import dry_run


def vit_flops(tokens, dim, depth, mlp_ratio=4):
    """Two per multiply-add: qkv and projection, the MLP, and the two products of attention."""
    return depth * (2 * tokens * dim * dim * (4 + 2 * mlp_ratio) + 2 * 2 * tokens * tokens * dim)


def test_flops_of_mae_vit_s16_by_hand():
    recipe = load_recipe("image-mae-s16", {"objective.decoder.depth": 3})
    cost = measure_cost(recipe, sketch_objective(recipe))
    patches, seen, width, narrow = 196, 49, 384, 512
    flops = 2 * seen * 768 * width + vit_flops(seen + 1, width, 12)
    flops += 2 * (seen + 1) * width * narrow + vit_flops(patches + 1, narrow, 2)
    # The last decoder block: keys and values of all tokens, everything else of the masked ones alone.
    masked = patches - seen
    flops += 2 * (patches + 1) * narrow * 2 * narrow + 2 * masked * narrow * narrow * (2 + 8)
    flops += 2 * 2 * masked * (patches + 1) * narrow + 2 * masked * narrow * 768
    assert cost.gflop_forward == pytest.approx(flops / 1e9, rel=1e-3)
    assert cost.gflop_train == 3 * cost.gflop_forward


def test_fewer_visible_tokens_cost_the_encoder_less():
    costs = []
    for ratio in (0.5, 0.75):
        recipe = load_recipe("image-mae-tiny", {"objective.mask_ratio": ratio})
        costs.append(measure_cost(recipe, sketch_objective(recipe)).gflop_forward)
    assert costs[1] < 0.75 * costs[0]


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))
        self.frozen = nn.Parameter(torch.ones(1000), requires_grad=False)

    def forward(self, batch):
        x = batch["signal"].flatten(1) * self.weight  # saves the input and the weight, which are there already
        y = x.exp()  # saves its output
        return Step((y * y).sum() + self.frozen.sum(), {})  # saves y, which is there already


def test_the_memory_of_a_toy_by_hand():
    foot = footprint(Toy(), sample_batch({"signal": (1, 1, 1000)}, None, (1,)), samples=7)
    row = 7 * 1000 * 4
    assert foot.weights == 2 * 4000
    assert foot.gradients == 4000
    assert foot.batch == row + 3 * 7 * 8
    assert row <= foot.activations < row + 64  # y, and scalars
    # Backward: y, the gradient of y * y and that of x, then the sum over rows; nothing is finished before the end.
    assert 3 * row <= foot.peak() < 5 * row
    assert foot.timeline[-1][0] in (0, 4000)


SETTINGS = {
    "plain": {},
    "checkpointing": {"model.backbone.checkpointing": True},
    "drop path": {"model.backbone.drop_path": 0.2},
    "bf16": {"train.precision": "bf16"},
    "bf16 checkpointing": {"model.backbone.checkpointing": True, "train.precision": "bf16"},
    "accumulated": {"train.accumulate": 4},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_fake_tensors_take_what_real_ones_do(settings):
    recipe = load_recipe("image-mae-tiny", {"train.batch_size": 16, "objective.decoder.depth": 2, **settings})
    accumulate, bf16 = recipe.train.accumulate, recipe.train.precision == "bf16"
    foot = measure_memory(recipe, sketch_objective(recipe), 6)
    objective = build_objective(recipe)
    batch = {name: torch.cat([value] * 6) for name, value in synthetic(objective, recipe.signal.size, "cpu").items()}
    state = {**dict(objective.named_parameters()), **dict(objective.named_buffers())}
    real = trace(objective, state, batch, accumulate, bf16)
    assert foot.timeline == tuple(real.timeline)
    assert foot.activations == real.after_forward
    assert foot.gradients == sum(p.grad.nbytes for p in objective.parameters())
    assert foot.weights == sum(t.nbytes for t in state.values())
    assert foot.batch == accumulate * sum(t.nbytes for t in batch.values())
    # Six small samples: the peak is at the end, where little is there but gradients.
    assert 0.9 * foot.gradients < max(gradients for gradients, _ in foot.timeline) <= foot.gradients
    assert foot.peak(0) < foot.peak(1)


def saved_bytes(objective, batch):
    """What autograd saves in a forward pass, each storage once, weights and inputs left out: another way to count."""
    own = {t.untyped_storage().data_ptr() for t in [*objective.parameters(), *objective.buffers(), *batch.values()]}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective(batch)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_saves(checkpointing, precision):
    settings = {"model.backbone.checkpointing": checkpointing, "train.precision": precision}
    recipe = load_recipe("image-mae-tiny", settings)
    objective = build_objective(recipe)
    batch = {name: torch.cat([value] * 64) for name, value in synthetic(objective, recipe.signal.size, "cpu").items()}
    foot = measure_memory(recipe, objective, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        saved = saved_bytes(objective, batch)
    assert foot.activations == pytest.approx(saved, rel=0.01)


def test_gradients_of_earlier_micro_batches_are_there():
    once, twice = (
        measure_memory(recipe, sketch_objective(recipe), 64)
        for recipe in (load_recipe("image-mae-tiny", {"train.accumulate": n}) for n in (1, 2))
    )
    assert once.peak() < once.activations + once.gradients <= twice.peak()


def test_checkpointing_saves_memory_and_the_plan_knows():
    peaks = []
    for checkpointing in (False, True):
        recipe = load_recipe("image-mae-tiny", {"model.backbone.checkpointing": checkpointing})
        foot = measure_memory(recipe, sketch_objective(recipe), 256)
        assert foot.peak() >= foot.activations
        peaks.append(foot.peak())
    assert peaks[1] < 0.8 * peaks[0]


def test_of_several_sizes_the_greatest_counts_and_tables_stay_real():
    recipe = load_recipe("image-mae-tiny", {"signal.buckets": [[64, 32]]})
    plain = load_recipe("image-mae-tiny")
    both = measure_memory(recipe, sketch_objective(recipe), 64)
    assert both.activations > 1.5 * measure_memory(plain, sketch_objective(plain), 64).activations
    # The table of positions of the other size is cached; what was planned with must not be in that cache.
    objective = build_objective(recipe)
    assert torch.isfinite(objective(synthetic(objective, (64, 32), "cpu")).loss)


FOOT = Footprint(weights=1000, gradients=800, batch=10, activations=500, timeline=((0, 500), (400, 600), (800, 50)))


def test_the_plain_plan_adds_up():
    assert FOOT.peak() == 1000
    assert FOOT.peak(0.5) == 800
    assert FOOT.peak(0) == 600
    memory = plan(FOOT, moments=2, averaged=True)
    assert memory == Memory(weights=1000, moments=1600, averages=1000, batch=10, buffers=0, step=1000)
    assert memory.total == 1000 + 1600 + 1000 + 10 + 1000
    assert plan(FOOT, moments=1, averaged=False).total == 1000 + 800 + 10 + 1000


SHARDED = {
    # Without ZeRO all gradients are copied into one tensor, when no activation is left.
    (0, False): Memory(1000, 1600, 0, 10, buffers=0, step=1600),
    # A copy of the fourth that is stepped on; whole gradients while they come, and a bucket of 4 x 5 bytes.
    (1, False): Memory(1000, 400, 0, 10, buffers=200, step=1020),
    (2, False): Memory(1000, 400, 0, 10, buffers=200, step=720),
    (2, True): Memory(1000, 0, 0, 10, buffers=0, step=620, host=1000),
    # Parameters whole in the pass, and 4 x 7 bytes of the next; the copy, flat gradients and the bucket stay.
    (3, False): Memory(250, 400, 0, 10, buffers=420, step=1628),
    (3, True): Memory(250, 0, 0, 10, buffers=20, step=1628, host=1000),
}


@pytest.mark.parametrize(("stage", "offload"), SHARDED)
def test_what_the_stages_spread(stage, offload):
    sharding = Sharding(stage, ranks=4, offload=offload, bucket=5, prefetch=7)
    memory = plan(FOOT, 2, False, sharding)
    assert memory == SHARDED[stage, offload]
    assert memory.total == sum(dataclasses.astuple(memory)) - memory.host


def test_sharding_is_read_from_deepspeeds_configuration():
    assert Sharding.of({}, 2) == Sharding(0, 2)
    assert Sharding.of(system_config("zero2"), 8) == Sharding(2, 8, bucket=50_000_000)
    offloaded = Sharding.of(system_config("zero3_offload"), 8)
    assert offloaded == Sharding(3, 8, offload=True, bucket=50_000_000, prefetch=50_000_000)
    assert Sharding.of({"zero_optimization": {"stage": 1, "offload_optimizer": None}}, 8) == Sharding(1, 8)
    undecided = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": None}
    assert Sharding.of({"zero_optimization": undecided}, 8) == Sharding(3, 8)


def test_a_dry_run_tells_its_parts():
    recipe = load_recipe("image-mae-tiny", {"train.ema": 0.99, "train.precision": "fp32"})
    facts = dry_run(recipe, None).as_dict()
    parts = ("weights", "moments", "averages", "batch", "step")
    assert facts["estimated_memory_gb"] == pytest.approx(sum(facts[f"memory_{part}_gb"] for part in parts))
    assert facts["memory_gradients_gb"] == pytest.approx(4 * facts["parameters"] / 1e9)
    assert facts["memory_activations_gb"] <= facts["memory_step_gb"]
    assert [row["deepspeed_config"] for row in facts["zero"]] == list(CONFIGS)
    assert {row["micro_batch"] for row in facts["zero"]} == {32}
    assert facts["zero"][-1]["host_memory_gb"] > 0


def test_a_dry_run_under_deepspeed_plans_for_it():
    recipe = load_recipe("image-mae-tiny", {"train.batch_size": 12})
    facts = dry_run(recipe, None, deepspeed_config="zero2").as_dict()
    assert facts["memory_buffers_gb"] > 0
    assert facts["zero"] == []  # 12 samples do not divide by 8 ranks
    with pytest.raises(UserError, match="zero2"):
        dry_run(recipe, None, deepspeed_config="zeroo2")


def test_planning_needs_no_memory_for_the_weights():
    recipe = load_recipe("image-mae-tiny", {"model.backbone": {"dim": 65536, "depth": 2, "num_heads": 64}})
    objective = sketch_objective(recipe)
    foot = measure_memory(recipe, objective, 100_000)
    assert foot.weights > 400e9
    assert foot.activations > 100e9
    assert measure(objective, synthetic(objective, recipe.signal.size)).parameters > 100e9
