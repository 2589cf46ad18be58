"""A small state of experts and dense weights; values depend on name and global index only."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import dmoe.checkpoint  # noqa: F401 (so that the fork server, which imports this module, has it)

E, D, F = 8, 3, 5  # experts (global), model width, expert hidden width


def full_state() -> dict[str, Tensor]:
    """Make the state of one process: experts [E, D, F], their moments, dense weights, a step."""
    expert = torch.arange(E * D * F, dtype=torch.float32).reshape(E, D, F) * 1.37
    return {
        "model.experts.w": expert.clone(),
        "optim.experts.w.exp_avg": (expert * 1e-3).to(torch.bfloat16),
        "optim.experts.w.exp_avg_sq": (expert.double() + 1) * 1e-9,
        "model.embed": torch.sin(torch.arange(33, dtype=torch.float32)).reshape(11, 3),
        "model.uneven": torch.arange(10, dtype=torch.int64).reshape(5, 2) + 2**60,
        "optim.step": torch.tensor(17, dtype=torch.int64),
        "optim.found_inf": torch.tensor(True),
    }


def ep_device_mesh(world: int, ep: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world // ep, ep), mesh_dim_names=("edp", "ep"))


def sharded_state(
    world: int, ep: int, fill: Callable[[Tensor], Tensor] = torch.clone
) -> dict[str, Tensor]:
    """Shard `full_state()`: experts and `uneven` over ep, all else replicated. Collective."""
    device_mesh = ep_device_mesh(world, ep)
    state: dict[str, Tensor] = {}
    for name, tensor in full_state().items():
        state[name] = fill(tensor)
        if "experts" in name or "uneven" in name:
            chunks = tensor.chunk(ep)
            mine = device_mesh.get_local_rank("ep")
            local = chunks[mine] if mine < len(chunks) else tensor[:0]
            placements = [Replicate(), Shard(0)]
            shape, stride = tensor.shape, tensor.stride()
            state[name] = DTensor.from_local(
                fill(local), device_mesh, placements, run_check=False, shape=shape, stride=stride
            )
    return state


def ones_like(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, 1)


def states_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Compare this rank's parts bit for bit."""
    for name, tensor in expected.items():
        one, other = (
            t.to_local() if isinstance(t, DTensor) else t.detach() for t in (state[name], tensor)
        )
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        if not torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))):
            return False
    return state.keys() == expected.keys()
