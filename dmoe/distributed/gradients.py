"""Gradient sums, norms and clipping: every gradient is the gradient of the global batch's loss.

Dense parameters: DDP sums over all ranks (`data_parallel.sum_dense_gradients`). Experts: the
all-to-all's backward already sums over the ranks of a row of the mesh; `ExpertGradients` sums over
the replicas, down the column. FSDP2 does both sums itself and leaves each rank a shard of each.
No group of parameters has a factor of its own. Bugs of this kind elsewhere: DeepSpeed#6545,
Megatron-LM#5916, megablocks#86, fastmoe#169.

In a training loop of one's own (`parallel_model`) the loss is the mean of the ranks' losses, as
under DDP, so gradients are averaged. Then a sum that is reduced once more, with a further backward,
stays right: the mean of equal numbers is the number. The factor 1/W of an expert is 1/EP for each
gradient before it is accumulated, and 1/EDP with each reduction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.tensor import DTensor

from dmoe.distributed.expert_parallel import expert_parameters, moe_layers
from dmoe.distributed.mesh import ParallelMesh


class ExpertGradients:
    """Sums each expert gradient over the expert's replicas, overlapped with the backward.

    A hook starts the all-reduce of a parameter as soon as its gradient of the last accumulation
    step is complete. Cost: one all-reduce per parameter and step over the EDP group; none with
    EDP = 1. With `average` gradients are means over all ranks, and complete when the backward ends.
    Parameters that FSDP2 has sharded are left to it.
    """

    def __init__(self, model: nn.Module, mesh: ParallelMesh, average: bool = False) -> None:
        self.group, self.sync_enabled, self.pending = mesh.edp_group, False, list[dist.Work]()
        self.average, self.replicas = average, mesh.edp
        for parameter in expert_parameters(model).values():
            if not parameter.requires_grad or isinstance(parameter, DTensor):
                continue
            if average and mesh.ep > 1:
                parameter.register_hook(partial(torch.mul, other=1 / mesh.ep))
            if self.group is not None:
                parameter.register_post_accumulate_grad_hook(self._start)

    def enable_sync(self, last: bool) -> None:
        """Reduce in the next backward if it is the `last` of the accumulation."""
        self.sync_enabled = last
        self.pending.clear()  # of a backward that failed

    def wait_for_grads(self) -> None:
        """Wait for all started all-reduces."""
        for work in self.pending:
            work.wait()
        self.pending.clear()

    def _start(self, parameter: Tensor) -> None:
        if self.sync_enabled:
            assert parameter.grad is not None
            if self.average:
                parameter.grad.div_(self.replicas)
                if not self.pending:
                    call_after_backward(self.wait_for_grads)
            work = dist.all_reduce(parameter.grad, group=self.group, async_op=True)
            assert work is not None
            self.pending.append(work)


class DenseGradients:
    """Averages dense gradients over all ranks at the end of a backward, for a model without DDP.

    In one order on all ranks, whatever the order of the backward. A parameter without a gradient on
    some ranks counts as zero there; without one on any rank it stays without. Cost: one all-reduce
    per dtype and step, and a copy of the dense gradients.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], mesh: ParallelMesh) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.world_size, self.sync_enabled, self.scheduled = mesh.world_size, False, False
        for parameter in self.parameters if mesh.world_size > 1 else ():
            parameter.register_post_accumulate_grad_hook(self._schedule)

    def _schedule(self, parameter: Tensor) -> None:
        if self.sync_enabled and not self.scheduled:
            self.scheduled = True
            call_after_backward(self._average)

    def _average(self) -> None:
        self.scheduled = False
        for dtype in dict.fromkeys(parameter.dtype for parameter in self.parameters):
            members = [parameter for parameter in self.parameters if parameter.dtype == dtype]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
            present = grads[0].new_tensor([p.grad is not None for p in members])
            flat = torch.cat([present, *(grad.flatten() for grad in grads)]).div_(self.world_size)
            dist.all_reduce(flat)
            present, *averages = flat.split([len(members), *(grad.numel() for grad in grads)])
            for parameter, grad, average in zip(members, grads, averages, strict=True):
                grad.copy_(average.view_as(grad))
                parameter.grad = grad
            for parameter, share in zip(members, present.tolist(), strict=True):
                parameter.grad = parameter.grad if share else None


def call_after_backward(function: Callable[[], None]) -> None:
    """Call `function` when the backward that is running has ended, as DDP and FSDP2 do."""
    Variable._execution_engine.queue_callback(function)


def squared_grad_norms(model: nn.Module, mesh: ParallelMesh) -> Tensor:
    """Compute this rank's share of the squared gradient norms, dense and expert.

    Summed over all ranks, the shares count each dense parameter once and each of the E experts
    once, so every rank computes the same norm from the same bits.

    Returns:
        [2], float32 (float64 for a float64 model).
    """
    experts = {id(parameter) for parameter in expert_parameters(model).values()}
    parameters = list(model.parameters())
    dense = _squared_norm((p for p in parameters if id(p) not in experts), mesh.world_size)
    expert = _squared_norm((p for p in parameters if id(p) in experts), mesh.edp)
    return torch.stack([dense.to(parameters[0].device), expert.to(parameters[0].device)])


def squared_router_grad_norm(model: nn.Module, mesh: ParallelMesh) -> Tensor:
    """Compute this rank's share of the routers' part of the dense squared norm (a scalar)."""
    return _squared_norm(
        (p for layer in moe_layers(model) for p in layer.router.parameters()), mesh.world_size
    )


def _squared_norm(parameters: Iterable[nn.Parameter], replicas: int) -> Tensor:
    """Divide by `replicas` for plain gradients; an element of a sharded one exists only once."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    dtype = torch.promote_types(grads[0].dtype, torch.float32)
    # the sharded ones first, so that no table of shares goes to the device
    grads.sort(key=lambda grad: not isinstance(grad, DTensor))
    sharded = sum(isinstance(grad, DTensor) for grad in grads)
    norms = torch._foreach_norm([local_tensor(g) for g in grads], 2.0, dtype=dtype)
    squares = torch.stack(norms).square()
    return squares[:sharded].sum() + squares[sharded:].sum() / replicas


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part that this rank holds, sharing memory; for collectives and in-place work."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def all_reduce_sum(value: Tensor, mesh: ParallelMesh) -> Tensor:
    """Sum `value` over all ranks, in place, on the control group."""
    if mesh.control_group is not None:
        dist.all_reduce(value, group=mesh.control_group)
    return value


def all_reduce_max(value: Tensor, mesh: ParallelMesh) -> Tensor:
    """Take the maximum of each element over all ranks, in place, on the control group."""
    if mesh.control_group is not None:
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=mesh.control_group)
    return value


class StepDecision(NamedTuple):
    """Tells fused AdamW how to take a step: `grad_scale` and `found_inf` of torch's optimizers."""

    grad_scale: Tensor | None
    """float32 scalar, by which the update divides the gradients. None: by nothing."""
    found_inf: Tensor | None
    """float32 scalar: 1 leaves weights, moments and step count as they are, 0 does not. None: 0."""


def decide_step(sums: Tensor, max_norm: float | None) -> StepDecision:
    """Decide on the device whether and how to clip, and whether to skip; no host read.

        grad_scale = max(1, (norm + 1e-6) / max_norm)
        found_inf  = norm or loss is not finite

    Args:
        sums: float64 [3], over all ranks: squared norms of dense and expert gradients, loss.
        max_norm: `optim.clip`.
    """
    norm = sums[:2].sum().sqrt()
    skip = ~torch.stack([norm, sums[2]]).isfinite().all()
    scale = None if max_norm is None else ((norm + 1e-6) / max_norm).clamp(min=1.0).float()
    return StepDecision(scale, skip.float())


def folds_clip(optimizer: torch.optim.Optimizer, loss_scaler: object = None) -> bool:
    """Return whether `step_as_decided` can clip: fused AdamW of float32 parameters.

    The scale is float32, too coarse for a float64 model; and a loss scaler sets it itself.
    """
    if loss_scaler is not None:
        return False
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has torch's
    clips = type(inner) is torch.optim.AdamW or getattr(inner, "clips_in_its_step", False)
    return clips and all(
        group["fused"] and all(p.dtype == torch.float32 for p in group["params"])
        for group in inner.param_groups
    )


def step_as_decided(optimizer: torch.optim.Optimizer, decision: StepDecision) -> None:
    """Take the step of a fused optimizer, which clips in its own pass over the gradients."""
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    inner.grad_scale, inner.found_inf = decision
    try:
        optimizer.step()
    finally:
        inner.grad_scale = inner.found_inf = None


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float | None) -> None:
    """Set the rate of each group, a multiple of that of the run."""
    for group in optimizer.param_groups if rate is not None else ():
        group["lr"] = rate * group.get("lr_scale", 1.0)


def start_host_copy(vector: Tensor) -> Callable[[], list[float]]:
    """Start to copy `vector` to the host; the result waits for it, not for later launches."""
    if not vector.is_cuda:
        return vector.tolist
    on_host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
    on_host.copy_(vector, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return on_host.tolist()

    return read


def clip_factor(norm: float, max_norm: float | None) -> float:
    """Compute `min(1, max_norm / (norm + 1e-6))`; 1 without a limit."""
    return 1.0 if max_norm is None else min(1.0, max_norm / (norm + 1e-6))


def clip_grads_(model: nn.Module, norm: float, max_norm: float | None) -> float:
    """Scale all gradients by `clip_factor`; return the factor.

    `norm` is the global norm, so the factor is the same on all ranks. No collective.
    """
    factor = clip_factor(norm, max_norm)
    if factor < 1.0:
        grads = [local_tensor(p.grad) for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, factor)
    return factor
