"""Auxiliary-loss-free load balancing: a selection bias, updated once per step.

    b_e += u * sign(mean over experts of c  -  c_e);  then b -= mean(b) if recentered

c_e = assignments of e over the whole global batch, before any drop (counted after drops it would
hardly move: no expert can then exceed its capacity), each counted once even with activation
recomputation. u is the rate. Wang et al. 2024, "Auxiliary-loss-free load balancing", algorithm 1;
DeepSeek-V3, section 2.1.2. Without recentering the biases can drift together, which changes no
selection but costs precision.

Every rank computes it from the same counts by the same operations: equal bits, no broadcast. The
caller sums the counts: the trainer with one stacked all-reduce for all layers per step, a loop of
one's own with `MoE.update_bias`. No host sync.

Letters: E experts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from dmoe.config.errors import ConfigError


def updated_bias(bias_E: Tensor, count_E: Tensor, rate: float, recenter: bool) -> Tensor:
    """Return the bias after a step.

    Args:
        bias_E: float32 or float64; any leading dimensions, such as layers.
        count_E: int64, assignments of the global batch; same shape.
        rate: u.
        recenter: subtract the mean afterwards.
    """
    num_experts = count_E.shape[-1]
    # sign(mean - c_e) = sign(sum - E * c_e), exact in integers: a mean rounded in floating point
    # could move an expert that is exactly at the mean
    direction_E = (count_E.sum(-1, keepdim=True) - num_experts * count_E).sign()
    bias_E = bias_E.detach() + rate * direction_E.to(bias_E.dtype)
    return bias_E - bias_E.mean(-1, keepdim=True) if recenter else bias_E


class PendingCounts:
    """The assignments of a layer's training forwards since the last update of its bias.

    A forward counts when its gradient comes back, by a hook on its output. So every accumulation
    step counts once, a forward that activation checkpointing runs twice counts once, and evaluation
    counts nothing, nor does any other forward without a backward.

    That an update was forgotten shows in the parameters: their version counters stand still while
    gradients are accumulated, and a step moves them. Fused optimizers move no counter (torch 2.13
    on the CPU), and some write to `parameter.data`: a hook on the steps of torch's optimizers sees
    these too, from the first counted forward to the update. Not seen: FSDP, whose gathered copies
    are not what the optimizer updates.
    """

    def __init__(self) -> None:
        self.count_E: Tensor | None = None
        """int64; None if nothing was counted."""
        self.versions: tuple[int, ...] = ()
        """Of the parameters in the first forward that was counted."""
        self.awaits_backward = False
        self.stepped = False
        """Whether an optimizer of torch has updated a parameter of the layer since."""
        self.remove_hook: Callable[[], object] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a copy, whose parameters have other versions and optimizers."""
        return {**self.__dict__, "remove_hook": None, "versions": ()}

    def watch(
        self, y: Tensor, count_E: Tensor, parameters: Iterable[nn.Parameter], name: str
    ) -> None:
        """Count a forward once its backward reaches the layer.

        Args:
            y: the layer's output, which requires a gradient.
            count_E: int64, its assignments before any drop.
            parameters: of the layer.
            name: of the layer, for the error.

        Raises:
            ConfigError: the parameters were updated since the last counted forward, the bias not.
        """
        watched = list(parameters)
        versions = tuple(parameter._version for parameter in watched)
        if self.count_E is not None and not self.versions:  # of a copy
            self.versions = versions
            self._notice_step(watched)
        if self.count_E is not None and (self.stepped or versions != self.versions):
            raise ConfigError(
                "balance.bias",
                "on",
                f"the weights of {name} were updated, and its balance bias was not",
                "call layer.update_bias() after optimizer.step(), or set balance.bias=0",
            )

        def count(_: Tensor) -> None:
            handle.remove()  # a second backward of the same forward counts nothing
            self.awaits_backward = False
            if self.count_E is None:
                self.count_E, self.versions = count_E, versions
                self._notice_step(watched)
            else:
                self.count_E = self.count_E + count_E

        handle = y.register_hook(count)
        self.awaits_backward = True

    def _notice_step(self, parameters: list[nn.Parameter]) -> None:
        """Set `stepped` once an optimizer of torch has updated one of the parameters."""
        ids, counts = {id(parameter) for parameter in parameters}, weakref.ref(self)

        def after_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
            updated = (id(p) for group in optimizer.param_groups for p in group["params"])
            if (pending := counts()) is not None and not ids.isdisjoint(updated):
                pending.stepped = True

        # Called by `take`, or when the layer is gone, whichever comes first.
        handle = register_optimizer_step_post_hook(after_step)
        self.remove_hook = weakref.finalize(self, handle.remove)

    def take(self, like_E: Tensor) -> Tensor:
        """Return the counts, int64 [E] on the device of `like_E`, and start again from zero.

        Raises:
            ConfigError: a training forward awaits its backward, and nothing was counted.
        """
        count_E = self.count_E
        if count_E is None and self.awaits_backward:
            raise ConfigError(
                "update_bias()",
                "too early",
                "no backward has reached the layer since its forward",
                "call it after loss.backward(), once per optimizer step",
            )
        self.count_E, self.versions, self.awaits_backward = None, (), False
        self.stepped = False
        if self.remove_hook is not None:
            self.remove_hook()
        if count_E is None:
            return torch.zeros_like(like_E, dtype=torch.int64)
        return count_E.to(like_E.device)
