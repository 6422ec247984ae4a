"""What the ranks of ``test_deepspeed_engine`` run, and the tiny objective and batches that they share with it.

Rank 0 writes what it finds into the folder: ``CASE.safetensors`` (the state) and ``CASE.json`` (losses, norms ...).
"""

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmssl.config import validate
from mmssl.distributed import Council, world
from mmssl.engine.deepspeed_setup import connect, merge, system_config
from mmssl.engine.finite import NonFiniteSamples
from mmssl.engine.optim import adamw, param_groups
from mmssl.masking import RandomMask
from mmssl.objectives.mae import MAEConfig
from modalities.encoder import Encoder, EncoderConfig, typed

STEPS, MIDDLE, BATCH, ACCUMULATE, CLIP, EMA_DECAY = 6, 3, 8, 2, 0.5, 0.9
STAGES = (0, 1, 2, 3)
BLAMED = (0, 2, 3)
"""The stages at which a loss is spoilt."""
HALF_PACE = 0.1
"""Factor on the learning rate in 16 bit: its rounding differs with the batch, and Adam blows up what should be zero."""
OVERFLOW = (2, 4)
"""The steps at which fp16's gradient is made infinite, before and after the middle."""


Micros = Callable[[int], list[dict[str, Tensor]]]


def make_objective() -> nn.Module:
    """Make a MAE with everything that is hard to shard: tensors of odd sizes, bare and frozen parameters, a buffer."""
    torch.manual_seed(0)
    config = {
        "modality": "image",
        "signal": {"size": [12, 12]},
        "model": {
            "tokenizer": {"patch_size": [3, 3], "positions": "learned"},
            "backbone": {"dim": 24, "depth": 2, "num_heads": 2, "drop_path": 0.2},
        },
    }
    encoder = Encoder(validate(typed(EncoderConfig, "image", "test"), config, "test"))
    decoder = {"dim": 24, "depth": 2, "num_heads": 2}
    objective = MAEConfig(name="mae", decoder=decoder).build({"image": encoder})
    objective.encoder.cls_token.requires_grad_(False)
    objective.register_buffer("seen", torch.zeros(3))
    return objective


def make_optimizer(objective: nn.Module) -> torch.optim.AdamW:
    # eps is far above the rounding noise in gradients that are zero but for it (the key's bias), which Adam would
    # otherwise blow up to whole steps.
    return adamw(param_groups(objective, weight_decay=0.05, layer_decay=0.7, depth=2), (0.9, 0.95), eps=1e-6)


def learning_rate(step: int) -> float:
    return 5e-4 * (step + 1)


def whole_batch(step: int) -> dict[str, Tensor]:
    """Draw the step's whole batch, with fresh masks."""
    rng = np.random.default_rng(step)
    draw = RandomMask(0.75)
    masks = [draw(rng, (4, 4)) for _ in range(BATCH)]
    batch = {key: torch.from_numpy(np.stack([mask[key] for mask in masks])) for key in ("keep", "drop")}
    index = torch.arange(BATCH) + step * BATCH
    signal = torch.from_numpy(rng.standard_normal((BATCH, 3, 12, 12), dtype=np.float32))
    return {"signal": signal, "index": index, "seed": index, **batch}


def split(batch: dict[str, Tensor], parts: int) -> list[dict[str, Tensor]]:
    return [{key: value.chunk(parts)[i] for key, value in batch.items()} for i in range(parts)]


def run_steps(engine: Any, steps: Iterable[int], micros: Micros, pace: float = 1.0) -> list[list[float]]:
    """Train; returns a list of [loss, gradient norm] of this rank."""
    found = []
    for step in steps:
        result = engine.step(micros(step), pace * learning_rate(step))
        engine.objective.seen += step
        more = [result.metrics[key].item() for key in ("loss_scale", "skipped")] if engine.scale is not None else []
        found.append([result.loss.item(), -1.0 if result.grad_norm is None else result.grad_norm.item(), *more])
    return found


def overflow(objective: nn.Module, at: tuple[int, ...]) -> None:
    """Make a value of a gradient infinite in the steps of ``seen``."""

    def spoil(grad: Tensor) -> Tensor:
        # ``seen`` is the sum of the steps before.
        now = next(step for step in range(STEPS) if step * (step - 1) / 2 == objective.seen[0])
        return grad.index_fill(0, torch.tensor(0), float("inf")) if now in at else grad

    objective.decoder.head.weight.register_hook(spoil)


def snapshot(engine: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in engine.state()}


class Ranks:
    """The cases, run by all ranks together."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.me = folder, world()
        connect(self.me, "cpu")
        self.council = Council(self.me.size)

    def engine(self, stage: int, precision: Any = "fp32", **zero: Any) -> Any:
        from mmssl.engine.deepspeed_engine import DeepSpeedEngine

        system = system_config(f"zero{stage}")
        buckets = {"reduce_bucket_size": 20_000} if stage else {}  # several buckets, and no gigabytes for a tiny model
        system["zero_optimization"] |= buckets | zero
        config = merge(system, BATCH // self.me.size // ACCUMULATE, ACCUMULATE, CLIP, precision)
        objective = make_objective()
        if self.me.rank:  # rank 0's weights must win
            torch.nn.init.ones_(objective.decoder.head.weight)
        return DeepSpeedEngine(objective, make_optimizer(objective), config, EMA_DECAY)

    def micros(self, step: int) -> list[dict[str, Tensor]]:
        return split(split(whole_batch(step), self.me.size)[self.me.rank], ACCUMULATE)

    def write(self, case: str, engine: Any, found: list[list[float]]) -> None:
        state = snapshot(engine)
        means = self.council.mean(torch.tensor(found, dtype=torch.float64)).tolist()
        counts = [engine.engine.global_steps, engine.engine.micro_steps]
        dtypes = sorted({str(parameter.dtype) for parameter in engine.objective.parameters()})
        if self.me.is_main:
            save_file({key: value.contiguous() for key, value in state.items()}, self.folder / f"{case}.safetensors")
            report = {"series": means, "counts": counts, "dtypes": dtypes}
            (self.folder / f"{case}.json").write_text(json.dumps(report))

    def train(self, case: str, stage: int, **zero: Any) -> None:
        engine = self.engine(stage, **zero)
        first = run_steps(engine, range(MIDDLE), self.micros)
        self.write(f"{case}-middle", engine, first)
        self.write(f"{case}-end", engine, first + run_steps(engine, range(MIDDLE, STEPS), self.micros))
        engine.close()

    def train_bf16(self, case: str, stage: int) -> None:
        engine = self.engine(stage, "bf16")
        self.write(f"{case}-end", engine, run_steps(engine, range(STEPS), self.micros, HALF_PACE))
        engine.close()

    def train_fp16(self, case: str, stage: int, **zero: Any) -> None:
        """Train with gradients that overflow on the last rank alone; then go on from what the torch engine wrote."""
        engine = self.engine(stage, "fp16", **zero)
        if self.me.rank == self.me.size - 1:
            overflow(engine.objective, OVERFLOW)
        self.write(f"{case}-end", engine, run_steps(engine, range(STEPS), self.micros, HALF_PACE))
        state = load_file(self.folder / "torch-fp16.safetensors")
        engine.scale.restore(json.loads((self.folder / "torch-fp16.json").read_text()))
        engine.load(state.__getitem__, MIDDLE)
        self.write(f"{case}-resumed", engine, run_steps(engine, range(MIDDLE, STEPS), self.micros, HALF_PACE))
        engine.close()

    def resume(self, case: str, stage: int, used: bool = False, **zero: Any) -> None:
        """Go on from what the torch engine wrote, in an engine that is fresh or has been ``used``."""
        state = load_file(self.folder / "torch-middle.safetensors")
        engine = self.engine(stage, **zero)
        if used:
            run_steps(engine, [0], self.micros)
        engine.load(state.__getitem__, MIDDLE)
        loaded = snapshot(engine)
        assert all(torch.equal(loaded[name], state[name]) for name in state), case
        self.write(f"{case}-end", engine, run_steps(engine, range(MIDDLE, STEPS), self.micros))
        engine.close()

    def non_finite(self, case: str, stage: int) -> None:
        engine = self.engine(stage)
        micros = self.micros(0)
        if self.me.rank == self.me.size - 1:
            micros[1]["signal"][:] = 3e38  # finite, but no sum of them is
        try:
            engine.step(micros, 1e-3)
            said: list[Any] = []
        except NonFiniteSamples as error:
            said = [error.tensor, error.samples]
        said = self.council.gather(said)
        if self.me.is_main:
            (self.folder / f"{case}.json").write_text(json.dumps(said))
        engine.engine.destroy()


def one_rank(folder: Path) -> None:
    """Run the cases of a process that no launcher started."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    ranks = Ranks(folder)
    for stage in (0, 2):
        ranks.train(f"zero{stage}", stage)
        ranks.resume(f"resume{stage}", stage)


def two_ranks(folder: Path) -> None:
    """Run the cases of two ranks."""
    ranks = Ranks(folder)
    for stage in STAGES:
        ranks.train(f"zero{stage}", stage)
        if stage in (0, 2):  # 1 is as 2, and 3 comes below
            ranks.resume(f"resume{stage}", stage)
    # By default stage 3 keeps tensors as small as ours gathered; now it cuts every one of them.
    cut = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 2_000}
    ranks.train("zero3-cut", 3, **cut)
    ranks.resume("resume3-cut", 3, **cut)
    ranks.resume("resume2-used", 2, used=True)
    ranks.resume("resume3-used", 3, used=True)
    ranks.resume("resume3-offload", 3, offload_optimizer={"device": "cpu"})
    ranks.resume("resume2-offload", 2, offload_optimizer={"device": "cpu"})
    ranks.train_bf16("zero2-bf16", 2)
    ranks.train_bf16("zero3-bf16", 3)
    for stage in STAGES:
        ranks.train_fp16(f"zero{stage}-fp16", stage)
    ranks.train_fp16("zero2-offload-fp16", 2, offload_optimizer={"device": "cpu"})
    for stage in BLAMED:
        ranks.non_finite(f"bad{stage}", stage)
