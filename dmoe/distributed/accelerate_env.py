"""Build accelerate's Accelerator from arguments alone: no environment variable changes a number.

accelerate reads some fifty variables, and a run's numbers would follow them in silence. With
`ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4` every gradient was divided by 4; `ACCELERATE_USE_FSDP`
wraps the model once more, `PMI_SIZE` changes the world. `accelerate launch` leaves them behind,
MPI too, and other jobs of the same shell. Here the config decides, so they are removed from this
process before accelerate and torch's libraries read them, and the result is checked.
"""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from dmoe.config.errors import ConfigError
from dmoe.config.launch_env import clear_environment
from dmoe.distributed.init import ProcessInfo

PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
TYPES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def make_accelerator(process: ProcessInfo, precision: str) -> Accelerator:
    """Return an Accelerator that is what the config says, whatever the environment holds.

    Args:
        process: rank and device of this process.
        precision: `fp32 | bf16 | fp16`.

    Raises:
        ConfigError: GPUs that accelerate refuses with their driver.
    """
    clear_environment()
    if process.in_group:
        # one process per machine sets none (PyTorchJob), and accelerate asserts that it is set
        os.environ.setdefault("LOCAL_RANK", str(process.local_rank))
        if not os.environ.get("OMP_NUM_THREADS", "0").isdecimal():
            # OpenMP takes `4,2` too, of which accelerate makes a number; torch has read it
            os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    try:
        accelerator = Accelerator(
            cpu=process.device.type == "cpu",
            mixed_precision=PRECISION[precision],
            gradient_accumulation_steps=1,
            step_scheduler_with_optimizer=False,
        )
    except NotImplementedError:
        # accelerate's only one here: GPUs of the RTX 40 series under drivers below 550.
        raise ConfigError(
            "NCCL_P2P_DISABLE",
            "",
            "must be set with NCCL_IB_DISABLE, since this driver has no peer-to-peer copies for"
            " these GPUs",
            "set both to 1, or install driver 550 or later",
        ) from None
    check_accelerator(accelerator, process, precision)
    return accelerator


def check_accelerator(accelerator: Accelerator, process: ProcessInfo, precision: str) -> None:
    """Assert that world, rank, device, precision and accumulation are those of dmoe."""
    state = accelerator.state
    assert accelerator.num_processes == process.world_size, "accelerate sees another world"
    assert accelerator.process_index == process.rank, "accelerate sees another rank"
    assert accelerator.device.type == process.device.type, "accelerate took another device"
    assert accelerator.mixed_precision == PRECISION[precision], "accelerate took another precision"
    assert accelerator.gradient_accumulation_steps == 1, "accelerate would divide the gradients"
    assert state.distributed_type in TYPES, f"accelerate took {state.distributed_type}"
    plugins = (state.deepspeed_plugin, getattr(state, "fsdp_plugin", None))
    assert not any(plugins), "accelerate took a plugin from the environment"
    assert torch.get_default_dtype() is torch.float32, "torch's default dtype was changed"
