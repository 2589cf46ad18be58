"""DDP for everything but the experts: what it must not touch, and that it sums where it would average.

Every rank holds all dense parameters whole, and its experts whole; `ExpertGradients` sums what DDP leaves alone.
"""

# No `from __future__ import annotations`: DDP compares the hook's annotations with the types themselves.

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from dmoe.distributed.gradients import ExpertGradients
from dmoe.distributed.parallelize import expert_parameters
from dmoe.distributed.topology import ParallelMesh

__all__ = ["DDPStrategy", "keep_experts_out_of_ddp", "sum_dense_gradients"]


class DDPStrategy:
    """`parallelize.Replication` by DDP, as accelerate wraps it; without a process group, accelerate's model alone."""

    def __init__(self, model: nn.Module, topology: ParallelMesh, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        keep_experts_out_of_ddp(model)
        # DDP refuses a model in which it has nothing to sum; then it is accelerate's model alone ("evaluation mode").
        nothing = not any(p.requires_grad for p in dense_parameters(model))
        self.wrapped: nn.Module = accelerator.prepare_model(model, evaluation_mode=nothing)
        if dist.is_initialized() and not nothing:
            sum_dense_gradients(self.wrapped)
        self.expert_gradients = ExpertGradients(model, topology)

    def grad_sync(self, last: bool) -> AbstractContextManager[None]:
        self.expert_gradients.enable_sync(last)
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def wait_for_grads(self) -> None:
        self.expert_gradients.wait_for_grads()


def keep_experts_out_of_ddp(model: nn.Module) -> None:
    """Tell DDP what it must not touch. Must be set on the root module, before DDP wraps it.

    That is the experts, which are not replicas, and the buffers (the routers' biases), which every rank computes from the same
    counts: DDP would broadcast them in every forward.

    Without this, DDP also broadcasts rank 0's experts over all others and then averages the gradients of different experts: equal
    shapes, no error. There is no public way yet (pytorch/pytorch#43690 asks for one); remove when there is.
    """
    buffers = [name for name, _ in model.named_buffers()]
    model._ddp_params_and_buffers_to_ignore = [*expert_parameters(model), *buffers]  # type: ignore[assignment]


def dense_parameters(model: nn.Module) -> list[nn.Parameter]:
    experts = set(expert_parameters(model))
    return [parameter for name, parameter in model.named_parameters() if name not in experts]


def sum_dense_gradients(ddp: nn.Module) -> None:
    """Make DDP sum gradients over the ranks, where it would average them, and prove that no expert is among them.

    The loss is already divided by the global number of tokens, so the sum over ranks *is* the gradient. Division on the wire is
    avoided besides: gloo has no AVG, and bf16 PREMUL_SUM on NCCL has lost gradients.
    """
    assert isinstance(ddp, DistributedDataParallel), f"expected DDP, got {type(ddp).__name__}"
    experts = {id(parameter) for parameter in expert_parameters(ddp.module).values()}
    reduced = {id(p) for name, p in ddp.module.named_parameters() if name not in ddp.parameters_to_ignore}
    assert not experts & reduced, "an expert's parameters are inside DDP: they would be overwritten by rank 0's"
    ddp.register_comm_hook(None, _sum)


def _sum(state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])  # type: ignore[no-any-return]
