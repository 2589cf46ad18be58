"""Memory: the least that a config needs, and one sentence where it was not enough.

`check_memory` refuses before torch starts what cannot fit into main memory. `explain_out_of_memory`
turns an allocation that failed later, on a CPU or a GPU, into an error that says what was needed,
what there is and which field to lower. Imports no torch.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from dmoe.config.errors import ConfigError, OutOfMemoryError
from dmoe.config.launch_env import main_memory
from dmoe.config.rules.parallel import batching, expert_parallel, model_size
from dmoe.config.schema import Config

BYTES_PER_PARAMETER = {"adamw": 16, "muon": 12}
"""In training, at least: weight, gradient, and AdamW's two moments or Muon's one, in float32."""
Stage = Literal["data", "model", "batch", "other"]
"""What was being done: reading the data, building the model, training or evaluating on a batch."""
FAILED = re.compile(
    r"out of memory|can(?:no|')t allocate memory|not enough memory|unable to allocate"
    r"|ALLOC_FAILED|bad_alloc",
    re.I,
)
"""Words of torch's allocators, CUDA, cuBLAS, cuDNN, numpy and C++ for memory that ran out."""
SIZE = r"([\d.]+ ?[KMGTP]i?B|\d+ bytes)"


def check_memory(config: Config, world: int, local_world_size: int, memory: int) -> None:
    """Refuse training that cannot fit into the main memory of this machine.

    Args:
        config: the whole config.
        world: number of ranks.
        local_world_size: ranks on this machine.
        memory: bytes of this machine.

    Raises:
        ConfigError: the model's training state, or the activations of one forward, do not fit.
    """
    size, fsdp = model_size(config), config.parallel.mode == "fsdp"
    dense = size.dense // (world if fsdp else 1)
    experts = size.experts // (world if fsdp else expert_parallel(config, world))
    bytes_each = BYTES_PER_PARAMETER.get(config.optim.kind, 8)
    bytes_each -= 4 * (config.optim.moments == "bf16")
    needed = bytes_each * local_world_size * (dense + experts)
    if needed > memory:
        allowed = (
            f"gives {size.dense + size.experts:,} parameters, whose training takes at least "
            f"{_gib(needed)} on this machine of {_gib(memory)}"
        )
        fix = "make the model smaller, or train it on more machines"
        raise ConfigError(*size.largest(config), allowed, fix)
    per_sequence = local_world_size * least_activations(config)
    micro_batch = batching(config, world).micro_batch
    if micro_batch * per_sequence > memory:
        field, value, fix = field_to_lower(config, world, "batch", memory // (2 * per_sequence))
        allowed = (
            f"one forward of {micro_batch:,} sequences per (virtual) rank takes at least "
            f"{_gib(micro_batch * per_sequence)} on this machine of {_gib(memory)}"
        )
        raise ConfigError(field, value, allowed, fix)


def least_activations(config: Config) -> int:
    """Return a lower bound of the bytes kept for backward per sequence of a (virtual) rank.

    The input of each block (without recomputation also those of its two norms, of the attention and
    of both its products), and the gradient of the last one's output; logits are never whole.
    """
    model, train = config.model, config.train
    if train.task == "classification":
        return 0
    tokens = config.data.seq_len * config.parallel.virtual_ranks
    width = 4 if train.precision == "fp32" else 2
    kept = 1 if train.recompute == "block" else 6
    return tokens * width * model.dim * (kept * model.layers + 1)


def field_to_lower(
    config: Config, world: int, stage: Stage, most: int | None = None
) -> tuple[str, object, str]:
    """Return the field on which the memory of a stage depends most, its value, and what to do.

    Args:
        config: the whole config.
        world: number of ranks.
        stage: what was being done.
        most: sequences per micro-batch that may fit; by default half of those there are.
    """
    train = config.train
    if stage == "data":
        fix = "use less text, or shards of it (dmoe data prepare), which are not loaded"
        return "data.source", config.data.source, fix
    if stage == "model":
        return *model_size(config).largest(config), (
            "lower it, or divide the model over more ranks (parallel.ep, parallel.mode=fsdp)"
        )
    batch = batching(config, world)
    share = batch.micro_batch * batch.accumulation
    most = min(batch.micro_batch // 2 if most is None else most, batch.micro_batch - 1)
    divisors = (n for n in range(min(most, share), 0, -1) if share % n == 0)
    if (fitting := next(divisors, None)) is not None:
        fix = f"use train.micro_batch={fitting} or less"
        if train.micro_batch is None:
            return "train.global_batch", train.global_batch, fix
        return "train.micro_batch", train.micro_batch, fix
    if train.recompute != "block":
        fix = "use train.recompute=block, or lower data.seq_len"
        return "train.recompute", train.recompute, fix
    return "data.seq_len", config.data.seq_len, "use a lower one, or lower model.dim"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, is memory that ran out."""
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError) and FAILED.search(str(error)):
            return True
        error = error.__cause__
    return False


def describe_out_of_memory(error: BaseException) -> str:
    """Say what was needed and what there is, as far as the error and the system tell."""
    text = str(error)
    needed = re.search(rf"(?:tried|unable) to allocate {SIZE}", text, re.I)
    what = f"{_size(needed[1])} more were needed" if needed else "more was needed"
    if gpu := re.search(rf"GPU (\d+) has a total capacity of {SIZE} of which {SIZE} is free", text):
        return f"out of memory: {what}, and GPU {gpu[1]} has {gpu[3]} free of {gpu[2]}"
    if re.search(r"CUDA|cuBLAS|cuDNN|NCCL", text, re.I):
        return f"out of memory on the GPU: {what} than it has free"
    free, total = _free_memory(), main_memory()
    there = f"{_gib(total)} of main memory"
    free_of = "" if free is None else f"{_gib(free)} free of "
    return f"out of memory: {what}, and there is {free_of}{there}"


@contextmanager
def explain_out_of_memory(config: Config, world: int, stage: Stage) -> Iterator[None]:
    """Raise OutOfMemoryError with a field to lower for memory that runs out in this block."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        field, value, fix = field_to_lower(config, world, stage)
        raise OutOfMemoryError(field, value, describe_out_of_memory(error), fix) from error


def _size(text: str) -> str:
    return _gib(int(text.split()[0])) if text.endswith("bytes") else text


def _gib(size: float) -> str:
    gib = size / 2**30
    return f"{gib:,.0f} GiB" if gib >= 10 else f"{gib:.2g} GiB"


def _free_memory() -> int | None:
    """Return the bytes that new allocations could take, of the machine; None outside Linux."""
    with suppress(OSError, AttributeError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        found = re.search(r"^MemAvailable: +(\d+) kB", text, re.M)
        return min(int(found[1]) * 1024, main_memory()) if found else None
    return None
