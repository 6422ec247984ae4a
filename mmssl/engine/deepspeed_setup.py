"""What comes before the DeepSpeed engine: its JSON, merged with the recipe, and the connection between the ranks.

Nothing here imports DeepSpeed at the top, because what it does when imported depends on the device; so import
``mmssl.engine.deepspeed_engine`` after ``connect``.
"""

import json
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any
from warnings import warn

import psutil
import torch
import torch.distributed as dist
from torch._appdirs import user_cache_dir

from mmssl.distributed import World, launch_facts, launched, world
from mmssl.engine.precision import Precision
from mmssl.errors import UserError, nearest

WORDS: dict[Precision, str] = {"bf16": "bfloat16", "fp16": "float16"}
"""What DeepSpeed calls the precisions of products."""

RECIPE_SECTIONS = {"optimizer": "optim", "scheduler": "optim.warmup and optim.min_lr", "bf16": "train.precision",
                   "fp16": "train.precision", "amp": "train.precision"}  # fmt: skip
"""Sections of DeepSpeed's JSON that would decide what the recipe decides, and the recipe's key."""

KEYS = {
    *RECIPE_SECTIONS, "activation_checkpointing", "aio", "autotuning", "bfloat16", "checkpoint", "comet",
    "comms_logger", "communication_data_type", "compile", "compression_training", "csv_monitor", "curriculum_learning",
    "data_efficiency", "data_parallel_size", "data_types", "dataloader_drop_last", "datastates_ckpt",
    "disable_allgather", "disable_python_gc", "dump_state", "eigenvalue", "elasticity", "expert_parallel",
    "flops_profiler", "gradient_accumulation_steps", "gradient_allreduce_op", "gradient_clipping",
    "gradient_predivide_factor", "graph_harvesting", "hybrid_engine", "log_level", "managed_gradient_accumulation",
    "memory_breakdown", "nebula", "pipeline", "prescale_gradients", "progressive_layer_drop", "quantize_training",
    "seq_parallel_communication_data_type", "sequence_parallel_size", "sparse_attention", "sparse_gradients",
    "steps_per_print", "tensor_parallel", "tensorboard", "timers", "torch_autocast", "train_batch_size",
    "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism", "vocabulary_size", "wall_clock_breakdown",
    "wandb", "weight_quantization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization",
}  # fmt: skip
"""All top-level keys that DeepSpeed 0.19 reads, also those that it refuses in words of its own. Others it passes over
in silence."""


def system_config(path_or_name: str) -> dict[str, Any]:
    """Return the DeepSpeed JSON in a file, or a shipped one by name (``zero0`` .. ``zero3``, ``zero3_offload``).

    Raises UserError for an unknown name, naming the nearest, and for what is not a JSON object, naming the line.
    """
    shipped = {Path(str(file)).stem: file for file in files("ds_configs").iterdir() if file.name.endswith(".json")}
    source = shipped.get(path_or_name, Path(path_or_name))
    if not source.is_file():
        source = shipped.get(path_or_name.removesuffix(".json"), source)
    if not source.is_file():
        hint = nearest(Path(path_or_name).stem, shipped)
        raise UserError(f"{path_or_name} is neither a DeepSpeed JSON file nor the name of a shipped one{hint}")
    try:
        config = json.loads(source.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path_or_name}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path_or_name}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path_or_name}: a DeepSpeed configuration is a JSON object, not a {type(config).__name__}")
    return config


def merge(
    system: Mapping[str, Any],
    micro_batch: int,
    accumulate: int,
    clip: float | None = None,
    precision: Precision = "fp32",
    where: str = "the DeepSpeed configuration",
) -> dict[str, Any]:
    """Return ``system`` completed with what the recipe decides: batch sizes, accumulation, clipping and precision.

    ``micro_batch`` is samples per rank and micro-step. A key that is the recipe's may be absent, "auto" or equal to the
    recipe's; otherwise UserError names both places (``where`` is the JSON's).
    """
    for key in system:
        if key not in KEYS:
            raise UserError(f"{where}: DeepSpeed knows no key '{key}'{nearest(key, KEYS)}")
    config = dict(system)
    decided: dict[str, tuple[float, str]] = {
        "train_batch_size": (micro_batch * accumulate * world().size, "train.batch_size"),
        "train_micro_batch_size_per_gpu": (micro_batch, "train.batch_size and train.accumulate"),
        "gradient_accumulation_steps": (accumulate, "train.accumulate"),
        "gradient_clipping": (clip or 0.0, "optim.clip"),
    }
    for key, (value, recipe) in decided.items():
        if config.get(key, "auto") not in ("auto", value):
            raise UserError(
                f"{where}: {key} is {config[key]}, but the recipe's {recipe} makes it {value}; leave it out"
            )
        config[key] = value
    for key, recipe in RECIPE_SECTIONS.items():
        if not _is_off(config.pop(key, "auto")):
            raise UserError(f"{where}: '{key}' is set, but the recipe decides it by {recipe}; {_instead(key)}")
    asked = autocast_precision(system, where)
    if asked not in (None, precision):
        raise UserError(
            f"{where}: torch_autocast makes it {asked}, but the recipe's train.precision is {precision}; leave the "
            "section out, or train.precision"
        )
    autocast = config.get("torch_autocast", "auto")
    # DeepSpeed's own sections would make the parameters 16 bit; autocast keeps them fp32, as the plain engine does.
    config["torch_autocast"] = {
        **({} if autocast == "auto" else autocast),
        "enabled": precision != "fp32",
        "dtype": "bfloat16" if precision == "fp32" else WORDS[precision],
    }
    _check_zero(config, where)
    # We bring our own AdamW, also to the CPU: DeepSpeed's would be compiled for minutes at the first start.
    config["zero_force_ds_cpu_optimizer"] = False
    return config


def autocast_precision(system: Mapping[str, Any], where: str = "the DeepSpeed configuration") -> Precision | None:
    """Return the precision that a configuration asks for in its ``torch_autocast`` section; None where it is silent."""
    section = system.get("torch_autocast", "auto")
    if section == "auto":
        return None
    names: dict[Any, Precision] = {word: precision for precision, word in WORDS.items()}
    enabled, dtype = (section.get(key, "auto") for key in ("enabled", "dtype")) if isinstance(section, dict) else (0, 0)
    if enabled not in (True, False, "auto") or dtype not in ("auto", *names):
        raise UserError(
            f'{where}: torch_autocast is {{"enabled": true or false, "dtype": "bfloat16" or "float16"}}, but this is '
            f"{section!r}"
        )
    if enabled is False:
        return "fp32"
    return names.get(dtype, "bf16" if enabled is True else None)


def _instead(section: str) -> str:
    # What to write for DeepSpeed's own sections, whose parameters would be 16 bit.
    if section not in ("bf16", "fp16", "amp"):
        return "leave it out"
    dtype = WORDS.get(section, WORDS["fp16"])  # type: ignore[call-overload]
    return (
        f'parameters stay fp32: write "torch_autocast": {{"enabled": true, "dtype": "{dtype}"}}, or leave it out and '
        f"set train.precision={'fp16' if section == 'amp' else section}"
    )


def _is_off(section: Any) -> bool:
    return section == "auto" or (isinstance(section, dict) and section.get("enabled") in (False, "auto"))


def _check_zero(config: Mapping[str, Any], where: str) -> None:
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UserError(f"{where}: zero_optimization is an object whose stage is 0, 1, 2 or 3, but this is {zero!r}")
    for key in ("offload_optimizer", "offload_param"):
        section = zero.get(key)
        if not isinstance(section, dict | None):
            raise UserError(f'{where}: {key} is an object such as {{"device": "cpu"}}, but this is {section!r}')
        if (section or {}).get("device") == "nvme":
            raise UserError(f"{where}: {key}.device 'nvme' cannot be checkpointed; use 'cpu' or leave it out")


def connect(me: World, device_type: str) -> torch.device:
    """Join the ranks of a run (NCCL on GPUs, gloo on CPUs) and return this rank's device; one rank needs no launcher.

    How long collectives wait is said by ``mmssl.engine.watch``; until it begins, by ``DEEPSPEED_TIMEOUT`` (minutes).
    """
    for lock in stale_locks():
        # Nothing that is shipped makes DeepSpeed compile; a JSON of one's own may.
        warn(f"{lock} was left by a process that is gone; what compiles the same would hang: delete it", stacklevel=2)
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", me.local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device_type == "cuda" else "gloo"
    alone = me.size == 1 and not dist.is_initialized() and not launched()
    os.environ.update(launch_facts())  # DeepSpeed reads them
    if me.size == 1 and not dist.is_initialized():
        os.environ.update(RANK="0", LOCAL_RANK=str(me.local_rank), WORLD_SIZE="1")
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)

    import deepspeed

    # Its shared-memory reduction serves inference alone, yet would be compiled at each first start: say it cannot be.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    if alone:
        del os.environ["RANK"]  # it would make a later run of this process believe in a launcher
    return device


def stale_locks() -> list[Path]:
    """Return the lock files of torch's extension builder that no process here holds open: their owners were killed."""
    # torch.utils.cpp_extension would tell the default, but also, when imported, of a missing CUDA toolkit.
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or user_cache_dir("torch_extensions"))
    locks = {file.resolve() for depth in ("*/lock", "*/*/lock") for file in root.glob(depth)}
    held: set[Path] = set()
    for process in psutil.process_iter() if locks else ():
        try:
            held.update(Path(file.path) for file in process.open_files())
        except psutil.Error:  # another person's process, or one that has just ended
            continue
    return sorted(locks - held)
