"""Every gradient is the gradient of one number: the loss of the global batch.

Dense parameters: DDP sums over all ranks (`ddp.sum_dense_gradients`). Experts: the all-to-all's backward has already summed over
the ranks of a row; here they are summed over the copies, down the column. FSDP2 does both sums itself, and leaves each rank a part
of each (`fsdp.py`). No class of parameters has a factor of its own. The worst bugs of every peer are exactly here:
DeepSpeed#6545, Megatron-LM#5916, megablocks#86, fastmoe#169.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dmoe.distributed.expert_parallel import expert_parameters, moe_layers
from dmoe.distributed.mesh import ParallelMesh


class ExpertGradients:
    """Sums each expert gradient over the copies of that expert, overlapped with backward.

    A hook starts the reduction of a parameter as soon as its gradient of the last accumulation step is complete; `finish` waits.
    Costs one all-reduce a parameter a step over the EDP group; none where EDP = 1.
    """

    def __init__(self, model: nn.Module, topology: ParallelMesh) -> None:
        self.group, self.sync_enabled, self.pending = topology.edp_group, False, list[dist.Work]()
        if self.group is not None:
            for parameter in filter(lambda p: p.requires_grad, expert_parameters(model).values()):
                parameter.register_post_accumulate_grad_hook(self._start)

    def enable_sync(self, last: bool) -> None:
        """Reduce in the coming backward if it is the `last` of the accumulation."""
        self.sync_enabled = last

    def wait_for_grads(self) -> None:
        for work in self.pending:
            work.wait()
        self.pending.clear()

    def _start(self, parameter: Tensor) -> None:
        if self.sync_enabled:
            assert parameter.grad is not None
            work = dist.all_reduce(parameter.grad, group=self.group, async_op=True)
            assert work is not None
            self.pending.append(work)


def squared_grad_norms(model: nn.Module, topology: ParallelMesh) -> Tensor:
    """[2], float32 (float64 for a float64 model): this rank's share of the squared gradient norm, dense and expert.

    Summed over all ranks the shares give the squares of each dense parameter once and of each of the E experts once, so that every
    rank computes the same norm from the same bits.
    """
    experts = {id(parameter) for parameter in expert_parameters(model).values()}
    parameters = list(model.parameters())
    dense = _squares((p for p in parameters if id(p) not in experts), topology.world_size)
    expert = _squares((p for p in parameters if id(p) in experts), topology.edp)
    return torch.stack([dense.to(parameters[0].device), expert.to(parameters[0].device)])


def squared_router_grad_norm(model: nn.Module, topology: ParallelMesh) -> Tensor:
    """Scalar: this rank's share of the squared norm of the routers' gradients, which are among the dense ones of `square_sums`."""
    return _squares(
        (p for layer in moe_layers(model) for p in layer.router.parameters()), topology.world_size
    )


def _squares(parameters: Iterable[nn.Parameter], copies: int) -> Tensor:
    """A plain gradient is held whole by `copies` ranks; of a sharded one each element is held once."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    wide = torch.promote_types(grads[0].dtype, torch.float32)
    squares = torch.stack(torch._foreach_norm([local_tensor(g) for g in grads], 2.0, dtype=wide)).square()
    share = torch.tensor(
        [1.0 if isinstance(g, DTensor) else 1.0 / copies for g in grads], dtype=wide
    )
    return squares @ share.to(squares.device)


def local_tensor(tensor: Tensor) -> Tensor:
    """What this rank holds, in the same memory: of a DTensor its part. Collectives and in-place work want it; autograd does not."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def all_reduce_sum(value: Tensor, topology: ParallelMesh) -> Tensor:
    """`value` summed over all ranks, in place, on the control communicator."""
    if topology.control_group is not None:
        dist.all_reduce(value, group=topology.control_group)
    return value


def all_reduce_max(value: Tensor, topology: ParallelMesh) -> Tensor:
    """The largest of each element over all ranks, in place, on the control communicator."""
    if topology.control_group is not None:
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=topology.control_group)
    return value


def clip_grads_(model: nn.Module, norm: float, limit: float) -> float:
    """Scale every gradient by `min(1, limit / (norm + 1e-6))`, the same on all ranks; returns the factor."""
    factor = min(1.0, limit / (norm + 1e-6))
    if factor < 1.0:
        torch._foreach_mul_(
            [local_tensor(p.grad) for p in model.parameters() if p.grad is not None], factor
        )
    return factor
