"""Rank of test_rank_failure.py: `OPERATION FAULT VICTIM TIMEOUT`; prints what a survivor says."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from dmoe.distributed.init import init_distributed, set_timeouts
from dmoe.distributed.rank_failure import LivenessResponder, is_collective_failure, lost_rank_error


def exchange(operation: str, world: int, model: torch.nn.Module) -> None:
    """Run one collective, as a step would."""
    if operation == "all_reduce":
        dist.all_reduce(torch.ones(8))
    elif operation == "all_to_all":
        dist.all_to_all_single(torch.empty(world), torch.ones(world))
    else:
        model(torch.ones(4, 8)).sum().backward()


def main(operation: str, fault: str, victim: int, timeout: float) -> None:
    """Exchange once; then the victim is lost, and the others print what they find."""
    process = init_distributed("cpu", "gloo", 60.0)
    model = DistributedDataParallel(torch.nn.Linear(8, 8))
    exchange(operation, process.world_size, model)
    set_timeouts([dist.group.WORLD], timeout)  # type: ignore[list-item]
    listener = LivenessResponder()
    dist.barrier()
    if process.rank == victim and fault == "late":
        time.sleep(timeout + 2)
    elif process.rank == victim:
        os.kill(os.getpid(), getattr(signal, fault))
    elif process.rank == 2:
        time.sleep(0.9)
    began = time.monotonic()
    try:
        exchange(operation, process.world_size, model)
        exchange(operation, process.world_size, model)
        said = "nothing"
    except RuntimeError as error:
        if not is_collective_failure(error):
            raise
        said = str(lost_rank_error(error, 12, time.monotonic() - began))
    print(json.dumps({"said": said, "seconds": time.monotonic() - began}), flush=True)
    del listener
    os._exit(1)  # like `dmoe train`: threads that wait for the lost rank must not delay or abort it


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
