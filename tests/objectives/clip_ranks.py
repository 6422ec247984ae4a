"""What each rank of ``test_clip`` runs on its half of the batch, and the tiny towers that tests share with it."""

import torch
import torch.distributed as dist

from mmssl.engine.deepspeed_setup import merge, system_config
from mmssl.engine.optim import adamw, param_groups
from modalities.fbank import LogMel
from tasks.build import build_objective, parse_recipe

BATCH, VOCABULARY, SAMPLES = 6, 514, 2680
START, END = VOCABULARY - 2, VOCABULARY - 1
SETTINGS = {
    "image": {
        "signal": {"size": [16, 16]},
        "model": {
            "tokenizer": {"patch_size": [8, 8], "positions": "learned"},
            "backbone": {"dim": 16, "depth": 2, "num_heads": 2, "pre_norm": True},
            "pool": "cls",
        },
    },
    "text": {
        "signal": {"context": 8},
        "model": {
            "tokenizer": {"name": "bpe", "vocab_size": VOCABULARY, "merges": ""},
            "backbone": {"name": "causal", "dim": 12, "depth": 2, "num_heads": 2, "memory": None, "rotary": False},
            "cls_token": False,
            "pool": "last",
        },
    },
    "audio": {
        "signal": {"sample_rate": 8000, "seconds": 0.32, "mels": 32, "fill": "pad"},
        "model": {"tokenizer": {"patch_size": [8, 8]}, "backbone": {"dim": 16, "depth": 1, "num_heads": 2}},
    },
}
CASES = {
    "two": (("image", "text"), {}),
    "two-chunked": (("image", "text"), {"chunk": 2}),
    "sigmoid": (("image", "text"), {"loss": "sigmoid"}),
    "three": (("image", "text", "audio"), {}),
    "three-chunked": (("image", "text", "audio"), {"chunk": 2}),
    "three-sigmoid": (("image", "text", "audio"), {"loss": "sigmoid"}),
}
STEPS = 4
CUT = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 2_000}
"""By default stage 3 keeps tensors as small as ours gathered; now it cuts every one of them."""
TRAINED = {
    "zero0": (0, {}, "two"),
    "zero1": (1, {}, "two"),
    "zero2": (2, {}, "three-chunked"),
    "zero3": (3, {}, "three"),
    "zero3-cut": (3, CUT, "three"),
    "zero3-cut-chunked": (3, CUT, "three-chunked"),
    "zero3-cut-sigmoid": (3, CUT, "sigmoid"),
}
"""Stage, settings of it and case."""
PRESENT = {"text": [True, False, True, True, True, True], "audio": [True, True, False, False, False, True]}
"""Of three towers: the ranks' halves have different numbers of them."""


def make(*names, drop_path=0.0, **objective):
    """Return CLIP of tiny towers; keywords are settings of the objective."""
    towers = {name: SETTINGS[name] for name in names}
    if drop_path:
        towers = {
            name: tower
            | {"model": tower["model"] | {"backbone": {**tower["model"]["backbone"], "drop_path": drop_path}}}
            for name, tower in towers.items()
        }
    page = {
        "towers": towers,
        "objective": {"name": "clip", "dim": 8, **objective},
        "train": {"steps": 1, "batch_size": BATCH},
    }
    return build_objective(parse_recipe(page, "test"))


def captions(count, generator):
    """Return texts of 1 to 6 random tokens, float32 [count, 1, 8]: numbers one higher, and 0 behind the end."""
    signal = torch.zeros(count, 1, 8)
    for row in signal:
        length = int(torch.randint(1, 7, (), generator=generator))
        words = torch.randint(START, (length,), generator=generator)
        row[0, : length + 2] = torch.tensor([START, *words.tolist(), END]) + 1.0
    return signal


def draw(*names, count=BATCH, seed=0):
    """Return a batch of random signals, all there."""
    generator = torch.Generator().manual_seed(seed)
    batch = {"index": torch.arange(count), "seed": torch.arange(count) + 100}
    for name in names:
        if name == "text":
            batch["text.signal"] = captions(count, generator)
        elif name == "image":
            batch["image.signal"] = torch.randn(count, 3, 16, 16, generator=generator)
        else:
            batch["audio.signal"] = torch.randn(count, 1, SAMPLES, generator=generator)
            batch["audio.length"] = torch.randint(1000, SAMPLES, (count,), generator=generator)
    return batch


def with_missing(batch):
    """Return a batch in which some samples lack a modality."""
    missing = {f"{name}.present": torch.tensor(there) for name, there in PRESENT.items() if f"{name}.signal" in batch}
    return batch | missing


def gradients(objective, batch):
    """Return the loss and metrics of a batch, and the gradient of every parameter that has one."""
    objective.zero_grad()
    step = objective(batch)
    step.loss.backward()
    found = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    return found | {"loss": step.loss.detach()} | {f"metrics/{name}": value for name, value in step.metrics.items()}


def widened(objective, batch):
    """Return both in float64, where equal things are equal on any processor; spectrograms are float32 before."""
    for module in objective.double().modules():
        if isinstance(module, LogMel):
            module.float().register_forward_hook(lambda *args: args[-1].double())
    return objective, {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def walk(rank, size):
    """Return for all cases what engines have after averaging over the ranks."""
    results = {}
    for case, (names, settings) in CASES.items():
        mine = share(batch_of(case, 0), rank, size)
        for name, value in gradients(make(*names, drop_path=0.3, **settings), mine).items():
            if size > 1:
                dist.all_reduce(value)
            results[f"{case}/{name}"] = value / size
    return results


def batch_of(case, seed):
    """Return the whole batch of a case."""
    names, _ = CASES[case]
    batch = draw(*names, seed=seed)
    return with_missing(batch) if len(names) > 2 else batch


def share(batch, rank, size):
    """Return a rank's part of a batch."""
    return {key: value.chunk(size)[rank] for key, value in batch.items()}


def objective_and_optimizer(case):
    """Return what engines train."""
    names, settings = CASES[case]
    objective = make(*names, drop_path=0.3, **settings)
    # eps is far above the noise in gradients that are zero but for rounding, as the deepspeed_ranks have it.
    return objective, adamw(param_groups(objective, weight_decay=0.2), (0.9, 0.98), eps=1e-3)


def series(engine, case, rank=0, size=1):
    """Train; returns the losses, averaged over the ranks."""
    losses = []
    for step in range(STEPS):
        loss = engine.step([share(batch_of(case, step), rank, size)], 1e-2).loss.detach().clone()
        if size > 1:
            dist.all_reduce(loss)
        losses.append((loss / size).item())
    return losses


def train(name, rank, size):
    """Train a case under DeepSpeed; returns the losses."""
    from mmssl.engine.deepspeed_engine import DeepSpeedEngine

    stage, zero, case = TRAINED[name]
    system = system_config(f"zero{stage}")
    system["zero_optimization"] |= ({"reduce_bucket_size": 20_000} if stage else {}) | zero
    engine = DeepSpeedEngine(*objective_and_optimizer(case), merge(system, BATCH // size, 1))
    losses = series(engine, case, rank, size)
    engine.close()
    return losses


def everything(rank, size):
    """Return what ``walk`` does, and the losses of every trained case, as one of the ranks."""
    return walk(rank, size) | {f"series/{name}": torch.tensor(train(name, rank, size)) for name in TRAINED}
