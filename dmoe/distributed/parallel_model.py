"""Any torch model with MoE layers, on N ranks, in a training loop of one's own.

    model = dmoe.parallelize(model, ep=2)
    optimizer = torch.optim.AdamW(model.parameters())
    model.backward(loss_of(model(x), y))     # of this rank's share of the batch
    model.clip_grad_norm_(1.0)
    optimizer.step()                         # also moves the balance biases
    optimizer.zero_grad()

The loss of the step is the mean of the ranks' losses, auxiliary losses included, as under DDP.

Cost of a step: see the strategies in `data_parallel`; one all-reduce of the assignments of all
layers if they have a balance bias; one of two numbers in `clip_grad_norm_`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer

from dmoe.config.errors import ConfigError
from dmoe.config.schema import ExchangeConfig
from dmoe.distributed.data_parallel import (
    DataParallel,
    DDPStrategy,
    FSDPStrategy,
    PlainStrategy,
    broadcast_weights,
)
from dmoe.distributed.expert_parallel import expert_parameters, shard_experts
from dmoe.distributed.full_tensors import (
    full_optimizer_state,
    full_state,
    load_full_state,
    local_optimizer_state,
)
from dmoe.distributed.gradients import (
    all_reduce_sum,
    call_after_backward,
    clip_grads_,
    squared_grad_norms,
)
from dmoe.distributed.mesh import ParallelMesh, launched_mesh
from dmoe.distributed.parallel_checks import (
    before_every_step,
    check_model,
    check_optimizer,
    check_reduced,
    check_unchanged,
    refuse_partial_state,
    watch_layers,
    wrapper_error,
)
from dmoe.distributed.placement.copy_cost import measure_break_even
from dmoe.moe.base_layer import MoELayer
from dmoe.moe.copy_planner import CopyRule

STRATEGIES: dict[str | None, Callable[[nn.Module, ParallelMesh], DataParallel]] = {
    "ddp": lambda model, mesh: DDPStrategy(model, mesh, average=True),
    "fsdp": lambda model, mesh: FSDPStrategy(model, mesh, average=True),
    None: PlainStrategy,
}


def parallelize(
    model: nn.Module,
    ep: int = 1,
    mode: str | None = "ddp",
    mesh: ParallelMesh | None = None,
    copies: int | str = 0,
    exchange: ExchangeConfig | None = None,
) -> ParallelModel:
    """Shard the experts over `ep` ranks, and make all gradients those of one process.

    In place, on every rank: once there is a process group, the model has its weights and device,
    and no optimizer yet. Without a process group it is one process. Collective: weights are those
    of the first rank that holds them.

    Args:
        model: any module with `dmoe.MoE` layers, not wrapped in DDP or FSDP.
        ep: expert-parallel size; divides the number of ranks, and that of the experts.
        mode: `ddp` replicates other parameters, `fsdp` shards them; None averages all gradients at
            the end of each backward, without a wrapper.
        mesh: that of another parallel model, to use its process groups; `ep` is then its own.
        copies, exchange: as in a config: docs/balance.md, docs/parallel.md.

    Raises:
        ConfigError: naming the argument that cannot work.
    """
    check_model(model, ep, mode, mesh, copies)
    before = {id(parameter): weakref.ref(parameter) for parameter in model.parameters()}
    mesh = mesh or launched_mesh(ep, next(model.parameters()).device, exchange)
    shard_experts(model, mesh, average=True, copies=CopyRule.of(copies), exchange=exchange)
    broadcast_weights(model, mesh)
    if copies == "auto":
        measure_break_even(model, mesh, next(model.parameters()).dtype)
    return ParallelModel(model, mesh, STRATEGIES[mode](model, mesh), before)


class ParallelModel(nn.Module):
    """A model with MoE layers on N ranks, made by `parallelize`. Call it like the model itself.

    Every rank runs the same number of forwards and backwards, of the same shapes if it is padded.
    Collective: all but `no_sync`, `load_state_dict` and `parameters`.
    """

    patience = 120.0
    """Seconds that `state_dict` waits for the other ranks to call it."""

    def __init__(
        self,
        model: nn.Module,
        mesh: ParallelMesh,
        data_parallel: DataParallel,
        replaced: Mapping[int, weakref.ref[nn.Parameter]],
    ) -> None:
        """Watch gradients and optimizers. `replaced`: the parameters before sharding, by id."""
        super().__init__()
        self.module, self.mesh = model, mesh
        self._data_parallel = [data_parallel]  # a list: its wrapper is no further child
        self._ddp: bool = getattr(data_parallel, "ddp", None) is not None
        self._sync = True
        """Whether the last forward was outside `no_sync`."""
        self._armed = False
        """DDP reduces once per forward; whether a backward may come."""
        self._in_backward = False
        self._unsynced = False
        """Whether gradients of this rank alone were accumulated last."""
        self._grad_versions: dict[int, int] = {}
        """Version of each expert gradient that was reduced last, by the parameter's id."""
        kept = {id(parameter) for parameter in model.parameters()}
        self._own, self._replaced = kept, {i: r for i, r in replaced.items() if i not in kept}
        self._experts = [
            parameter
            for parameter in expert_parameters(model).values()
            if parameter.requires_grad and not isinstance(parameter, DTensor)
        ]
        if mesh.world_size > 1:
            watch_layers(model, getattr(data_parallel, "ddp", None))
            for parameter in model.parameters():
                if parameter.requires_grad and not isinstance(parameter, DTensor):
                    parameter.register_post_accumulate_grad_hook(self._on_gradient)
        before_every_step(self, ParallelModel._before_step)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Refuse DDP, which asks a module for this list when it wraps it."""
        raise wrapper_error("DistributedDataParallel")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model on this rank's share of the batch."""
        data_parallel = self._data_parallel[0]
        if not torch.is_grad_enabled():
            return data_parallel.wrapped(*args, **kwargs)
        self._armed, self._unsynced, self._in_backward = self._sync, not self._sync, False
        with data_parallel.grad_sync(self._sync):
            return data_parallel.wrapped(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Run `loss.backward()`: afterwards `grad` is that of the mean of the ranks' losses."""
        loss.backward()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients on this rank: for the forwards and backwards of a step but the last.

        Left out, gradients are right too, and reduced in every backward.
        """
        self._sync = False
        try:
            yield
        finally:
            self._sync = True

    def clip_grad_norm_(self, max_norm: float) -> float:
        """Scale all gradients by `min(1, max_norm / norm)`; return the global norm.

        The norm counts each of the E experts once, as one process does; torch's function would see
        the experts of this rank. `math.inf` scales nothing. One host read.
        """
        if not max_norm > 0:
            raise ConfigError("max_norm", max_norm, "must be greater than 0", "use 1.0")
        self._check_synced()
        squares = all_reduce_sum(squared_grad_norms(self.module, self.mesh), self.mesh)
        norm = math.sqrt(squares.sum().item())
        clip_grads_(self.module, norm, max_norm)
        self._grad_versions = self._versions()
        return norm

    def step_balance(self) -> None:
        """Move the balance biases by the assignments since the last call (`balance.bias`).

        torch's optimizers call it in their step; call it yourself if you update in another way.
        """
        layers = [layer for layer in self.module.modules() if isinstance(layer, MoELayer)]
        pending = [(layer, layer.pending_counts) for layer in layers]
        layers = [layer for layer, found in pending if found and found.count_E is not None]
        if not layers:
            return
        counts = [layer.take_counts() for layer in layers]
        total = all_reduce_sum(torch.cat(counts), self.mesh)
        for layer, count_E in zip(layers, total.split([len(c) for c in counts]), strict=True):
            layer.move_bias(count_E)

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the state of the whole model by the names of one process, on the CPU of each rank.

        All E experts are in it, by their global ids: `load_state_dict` of one process or of any
        number of ranks takes it. Call it on every rank and save it on one. Memory: the whole model.

        Raises:
            ConfigError: a rank did not call it within `patience` seconds.
        """
        self._barrier("state_dict()")
        return full_state(self.module, self.mesh)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Load what `state_dict` returned, or that of the model on one process. No collective.

        Raises:
            ConfigError: a name is missing, unknown or of another shape; nothing is changed then.
        """
        load_full_state(self.module, self.mesh, state)
        for layer in self.module.modules():
            if isinstance(layer, MoELayer):
                layer.forget_counts()

    def optimizer_state_dict(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimizer by names, like `state_dict`; see there."""
        self._barrier("optimizer_state_dict()")
        return full_optimizer_state(self.module, optimizer, self.mesh)

    def load_optimizer_state_dict(self, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Load what `optimizer_state_dict` returned, at any number of ranks. No collective."""
        local = local_optimizer_state(self.module, optimizer, self.mesh, state)
        optimizer.load_state_dict(local)

    def _barrier(self, call: str) -> None:
        """Wait for all ranks to make the same call, so that one that does not is an error."""
        if self.mesh.checkpoint_group is None or dist.get_backend() == "fake":
            return
        limit = timedelta(seconds=self.patience)
        try:
            dist.monitored_barrier(self.mesh.checkpoint_group, limit, wait_all_ranks=True)
        except RuntimeError:
            why = f"another rank has not called it within {self.patience:g} seconds"
            fix = "call it on every rank, and save the result on one"
            raise ConfigError(call, f"on rank {self.mesh.rank}", why, fix) from None

    def _on_gradient(self, parameter: Tensor) -> None:
        """Notice that a backward has begun, and when it ends."""
        if self._in_backward:
            return
        if self._ddp and not self._armed and not self._unsynced:
            why = "DDP reduces the gradients of one backward per forward"
            fix = "add the losses and call backward once, or use parallelize(mode=None)"
            raise ConfigError("backward", "a second one", why, fix)
        self._in_backward = True
        call_after_backward(self._end_backward)

    def _end_backward(self) -> None:
        self._in_backward = self._armed = False
        self._grad_versions = self._versions()

    def _versions(self) -> dict[int, int]:
        return {id(p): p.grad._version for p in self._experts if p.grad is not None}

    def _before_step(self, optimizer: Optimizer) -> None:
        """Check the gradients and move the biases, before an optimizer updates the model."""
        updated = check_optimizer(optimizer, self._replaced)
        if self._own.isdisjoint(updated):
            return
        self._check_synced()
        if self._ddp:
            check_reduced(self.module)
        if self.mesh.ep > 1:
            refuse_partial_state(optimizer)
            now = self._versions()
            check_unchanged(
                now.get(i, noted) == noted
                for i, noted in self._grad_versions.items()
                if i in updated
            )
        self.step_balance()

    def _check_synced(self) -> None:
        if self._unsynced and self.mesh.world_size > 1:
            why = "the gradients are those of this rank alone"
            fix = "leave the last forward and backward of a step out of no_sync"
            raise ConfigError("no_sync", "around the last backward", why, fix)
