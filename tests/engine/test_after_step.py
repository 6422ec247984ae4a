"""What an objective does after each step (teacher, queue, running mean) is the same under ZeRO on 2 ranks.

Planted bugs that fail here: ``after_step`` outside of ``Engine.whole`` (stage 3 hands it empty parameters), a queue of
the rank's own rows, buffers left out of the checkpoint.
"""

import pytest
import torch
from safetensors.torch import load_file
from teacher import TeacherObjective, teacher_batch

from mmssl import launch
from mmssl.contracts import Progress
from mmssl.distributed import world
from mmssl.engine.deepspeed_setup import connect, merge, system_config
from mmssl.engine.optim import adamw, param_groups
from mmssl.engine.torch_engine import TorchEngine
from mmssl.files import save_tensors

STEPS, MIDDLE, BATCH, ACCUMULATE = 6, 3, 8, 2
CUT = {"stage3_param_persistence_threshold": 0}
"""So that stage 3 cuts tensors as small as these too."""
STAGES = (0, 1, 2, 3)


def optimizer(objective):
    return adamw(param_groups(objective, weight_decay=0.05, layer_decay=1.0, depth=1), (0.9, 0.95), eps=1e-6)


def walk(engine, steps, rank=0, size=1):
    """Train as the loop does; returns the losses of this rank."""
    losses = []
    for step in steps:
        parts = teacher_batch(step, BATCH)
        micros = [
            {key: value.chunk(size * ACCUMULATE)[i * size + rank] for key, value in parts.items()}
            for i in range(ACCUMULATE)
        ]
        losses.append(engine.step(micros, 1e-2).loss.item())
        with engine.whole():
            engine.objective.after_step(Progress(step + 1, STEPS))
    return losses


def state(engine):
    return {name: tensor.detach().clone() for name, tensor in engine.state()}


def torch_engine():
    objective = TeacherObjective()
    return TorchEngine(objective, optimizer(objective), torch.device("cpu"))


def on_two_ranks(folder):
    """At each stage: train from the start, and from what one process wrote."""
    from mmssl.engine.deepspeed_engine import DeepSpeedEngine

    me = world()
    connect(me, "cpu")
    losses = {}
    for stage in STAGES:
        for case in ("whole", "resumed"):
            system = system_config(f"zero{stage}")
            system["zero_optimization"] |= CUT if stage == 3 else {}
            objective = TeacherObjective(seed=me.rank if case == "whole" else 7)  # rank 0's weights and buffers win
            engine = DeepSpeedEngine(
                objective, optimizer(objective), merge(system, BATCH // me.size // ACCUMULATE, ACCUMULATE)
            )
            if case == "whole":
                found = walk(engine, range(MIDDLE), me.rank, me.size)
                write(folder / f"zero{stage}-middle", engine, me)
                found += walk(engine, range(MIDDLE, STEPS), me.rank, me.size)
            else:
                engine.load(load_file(folder / "torch-middle").__getitem__, MIDDLE)
                found = walk(engine, range(MIDDLE, STEPS), me.rank, me.size)
            write(folder / f"zero{stage}-{case}", engine, me)
            losses[f"zero{stage}-{case}"] = found
            engine.close()
    return losses


def write(file, engine, me):
    found = state(engine)
    assert engine.layout().keys() == found.keys()
    if me.is_main:
        save_tensors(file, found)


@pytest.fixture(scope="module")
def reference():
    torch.set_num_threads(1)
    engine = torch_engine()
    losses = walk(engine, range(MIDDLE))
    middle = state(engine)
    return {"losses": losses + walk(engine, range(MIDDLE, STEPS)), "middle": middle, "end": state(engine)}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, reference):
    folder = tmp_path_factory.mktemp("teacher")
    save_tensors(folder / "torch-middle", reference["middle"])
    ranks = launch.run(on_two_ranks, (folder,), 2)
    return folder, {case: torch.tensor([rank[case] for rank in ranks]).mean(0) for case in ranks[0]}


def test_the_reference_moves_all_its_buffers(reference):
    start = dict(TeacherObjective().named_buffers())
    still = [name for name in start if torch.equal(start[name], reference["end"][f"buffer/{name}"])]
    assert still == ["pointer"]  # 6 steps of 8 rows in a queue of 16
    assert not torch.equal(start["pointer"], reference["middle"]["buffer/pointer"])


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["whole", "resumed"])
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_one_process(two_ranks, reference, stage, case):
    folder, losses = two_ranks
    expected = reference["losses"][MIDDLE if case == "resumed" else 0 :]
    torch.testing.assert_close(losses[f"zero{stage}-{case}"], torch.tensor(expected), rtol=0, atol=1e-5)
    assert_same(load_file(folder / f"zero{stage}-{case}"), reference["end"])


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_one_process_goes_on_from_two_ranks(two_ranks, reference, stage):
    engine = torch_engine()
    engine.load(load_file(two_ranks[0] / f"zero{stage}-middle").__getitem__, MIDDLE)
    losses = walk(engine, range(MIDDLE, STEPS))
    torch.testing.assert_close(losses, reference["losses"][MIDDLE:], rtol=0, atol=1e-5)
    assert_same(state(engine), reference["end"])


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
