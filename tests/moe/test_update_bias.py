"""The balance bias in a loop of one's own: `layer.update_bias()`, and what happens without it.

`MoE(balance=BalanceConfig(bias=0.01))` never moved its bias outside the trainer, in silence: the
counts of a step are known to who runs the steps.
"""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.checkpoint import checkpoint

from dmoe import MoE
from dmoe.config.errors import ConfigError
from dmoe.config.schema import BalanceConfig, RouterConfig
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.mesh import build_mesh
from dmoe.modular import constant
from dmoe.moe.interfaces import DataParallelComm
from dmoe.moe.load_balancing import updated_bias
from dmoe.moe.routers import build_router
from tests.moe.layers import DIM, tokens_of
from tests.moe.threaded_ranks import run_threads
from tests.ranks import run_ranks

BALANCE = BalanceConfig(bias=0.01)


def make(**options: Any) -> MoE:
    return MoE(
        **{"dim": DIM, "expert_dim": 4, "num_experts": 5, "top_k": 2, "balance": BALANCE, **options}
    )


def batch(seed: int) -> Tensor:
    return tokens_of(2, 6, seed=seed, dtype=torch.float32).detach()


def backward(layer: MoE, x: Tensor) -> Tensor:
    """Run forward and backward; return the counts, int64 [E]."""
    output = layer(x)
    output.y.square().sum().backward()
    return output.stats.choice_E


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "one by one": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_own_loop_moves_the_bias(name: str) -> None:
    layer = make()
    optimizer, expected_E = OPTIMIZERS[name](list(layer.parameters())), torch.zeros(5)
    for step in range(3):
        count_E = backward(layer, batch(step))
        optimizer.step()
        optimizer.zero_grad()
        layer.update_bias()
        expected_E = updated_bias(expected_E, count_E, 0.01, recenter=True)
        assert torch.equal(layer.router.get_buffer("bias_E"), expected_E)
    assert expected_E.abs().max() > 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_forgotten_is_an_error_in_the_next_training_forward(name: str) -> None:
    layer = make()
    optimizer = OPTIMIZERS[name](list(layer.parameters()))
    backward(layer, batch(0))
    optimizer.step()
    layer.eval()
    layer(batch(1))  # evaluation is no training
    layer.train()
    with torch.no_grad():
        layer(batch(1))
    with pytest.raises(ConfigError, match=r"MoE layer 0 were updated.*call layer.update_bias\(\)"):
        layer(batch(1))
    layer.update_bias()
    layer(batch(1))


def test_a_step_of_another_optimizer_is_none_of_the_layer() -> None:
    """A discriminator accumulates gradients while its generator takes steps."""
    layer, other = make(), nn.Linear(2, 2)
    backward(layer, batch(0))
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.AdamW(other.parameters(), fused=True).step()
    backward(layer, batch(1))


class WritesData(torch.optim.SGD):
    """Updates `parameter.data`, as older optimizers do: no version counter moves."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-0.1)


def test_a_step_that_writes_to_data_is_noticed() -> None:
    layer = make()
    optimizer = WritesData(layer.parameters(), lr=0.1)
    backward(layer, batch(0))
    optimizer.step()
    with pytest.raises(ConfigError, match="update_bias"):
        layer(batch(1))


def test_hooks_end_with_the_update_and_with_the_layer() -> None:
    """The hook is one of all optimizers of the process: it must not outlive its purpose."""
    before = len(_global_optimizer_post_hooks)
    layer, dropped = make(), make()
    backward(layer, batch(0))
    backward(dropped, batch(0))
    assert len(_global_optimizer_post_hooks) == before + 2
    layer.update_bias()
    del dropped
    gc.collect()
    assert len(_global_optimizer_post_hooks) == before


def test_accumulation_steps_count_together() -> None:
    """Several forwards and backwards before one step are no forgotten update."""
    layer = make()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    count_E = backward(layer, batch(0)) + backward(layer, batch(1))
    first, second = layer(batch(2)), layer(batch(3))  # both forwards before both backwards
    (first.y.sum() + second.y.sum()).backward()
    count_E = count_E + first.stats.choice_E + second.stats.choice_E
    optimizer.step()
    layer.update_bias()
    expected_E = updated_bias(torch.zeros(5), count_E, 0.01, recenter=True)
    assert torch.equal(layer.router.get_buffer("bias_E"), expected_E)


def test_what_has_no_backward_does_not_count() -> None:
    """Evaluation, with or without eval() and no_grad(), and a forward whose loss is not used."""
    layer, other = make(), make()
    layer(batch(5))
    with torch.no_grad():
        layer(batch(6))
    layer.eval()(batch(7))
    layer.train()
    backward(layer, batch(0))
    layer(batch(8))
    backward(other, batch(0))
    layer.update_bias()
    other.update_bias()
    assert torch.equal(layer.router.get_buffer("bias_E"), other.router.get_buffer("bias_E"))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_counts_once(use_reentrant: bool) -> None:
    """The recomputed forward makes the same counts again (torchtitan halves them)."""
    counts = []
    for recompute in (False, True):
        layer, x = make(), batch(0).requires_grad_()

        def run(x: Tensor, layer: MoE = layer) -> Tensor:
            return layer(x).y

        y = checkpoint(run, x, use_reentrant=use_reentrant) if recompute else run(x)
        y.square().sum().backward()
        assert layer.pending_counts is not None
        counts.append(layer.pending_counts.count_E)
    assert counts[0] is not None
    assert torch.equal(counts[0], counts[1])  # type: ignore[arg-type]


def test_a_second_backward_of_one_forward_counts_once() -> None:
    layer = make()
    output = layer(batch(0))
    output.y.sum().backward(retain_graph=True)
    output.y.square().sum().backward()
    assert layer.pending_counts is not None
    assert torch.equal(layer.pending_counts.count_E, output.stats.choice_E)  # type: ignore[arg-type]


def test_too_early_is_an_error() -> None:
    """Between forward and backward nothing is counted yet: the bias would lag one step behind."""
    layer = make()
    layer(batch(0))
    with pytest.raises(ConfigError, match=r"call it after loss.backward\(\)"):
        layer.update_bias()


def test_nothing_to_do_is_no_error() -> None:
    """A loop over all layers may meet one without a bias, and one that this step did not use."""
    for layer in (make(balance=BalanceConfig()), make()):
        layer.update_bias()
        assert layer.router.get_buffer("bias_E").abs().max() == 0


def test_new_weights_forget_the_counts() -> None:
    layer = make()
    state = copy.deepcopy(layer.state_dict())
    backward(layer, batch(0))
    layer.load_state_dict(state)
    layer(batch(1))
    backward(layer, batch(0))
    layer.initialize(3)
    layer(batch(1))


def test_a_copy_counts_for_itself() -> None:
    layer = make()
    backward(layer, batch(0))
    twin = copy.deepcopy(layer)
    backward(layer, batch(1))
    assert layer.pending_counts is not None
    assert twin.pending_counts is not None
    assert int(layer.pending_counts.count_E.sum()) == 2 * int(twin.pending_counts.count_E.sum())  # type: ignore[union-attr]


@pytest.mark.parametrize("how", ["copy", "file"])
def test_a_copy_between_backward_and_update_is_used_in_training(how: str) -> None:
    """Its parameters have other version counters: it said that an update had been forgotten."""
    layer = make()
    backward(layer, batch(0))
    if how == "copy":
        twin = copy.deepcopy(layer)
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        twin = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    twin(batch(1))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.9)
    with pytest.raises(ConfigError, match="were updated, and its balance bias was not"):
        twin(batch(1))


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_ranks_get_the_bits_of_one_process(ranks: int) -> None:
    x = tokens_of(6, 4, dtype=torch.float32).detach()
    alone = make()
    backward(alone, x)
    alone.update_bias()

    def one(comm: DataParallelComm) -> Tensor:
        layer = make(balance=BalanceConfig(switch=0, z=0, bias=0.01))
        layer.comm = comm
        backward(layer, x.chunk(ranks)[comm.rank])
        layer.update_bias()
        return layer.router.get_buffer("bias_E")

    for bias_E in run_threads(ranks, one):
        assert torch.equal(bias_E, alone.router.get_buffer("bias_E"))


def on_a_rank(rank: int, world: int) -> list[float]:
    """Take one step of a loop of one's own with sharded experts; the bias afterwards."""
    layer = make(num_experts=4, balance=BalanceConfig(switch=0, z=0, bias=0.01))
    shard_experts(layer, build_mesh(2, torch.device("cpu"), 60.0))
    layer.initialize(0)
    backward(layer, tokens_of(6, 4, dtype=torch.float32).detach().chunk(world)[rank])
    layer.update_bias()
    bias: list[float] = layer.router.get_buffer("bias_E").tolist()
    return bias


@pytest.mark.ranks
def test_two_processes_with_expert_parallelism() -> None:
    alone = make(num_experts=4)
    backward(alone, tokens_of(6, 4, dtype=torch.float32).detach())
    alone.update_bias()
    assert run_ranks(2, on_a_rank) == [alone.router.get_buffer("bias_E").tolist()] * 2


def cast_layer(how: str) -> nn.Module:
    layer = make()
    layer.router.get_buffer("bias_E").fill_(0.501)
    if how == "load":
        state = {name: value.bfloat16() for name, value in layer.state_dict().items()}
        layer.load_state_dict(state, assign=True)
        layer.router.get_buffer("bias_E").fill_(0.501)
        return layer
    casts: dict[str, Callable[[], nn.Module]] = {
        "bfloat16": layer.bfloat16,
        "half": layer.half,
        "to": lambda: layer.to(torch.bfloat16),
        "double and back": lambda: layer.double().bfloat16(),
        "type": lambda: layer.type(torch.float16),
    }
    return casts[how]()


@pytest.mark.parametrize("how", ["bfloat16", "half", "to", "double and back", "type", "load"])
def test_the_bias_stays_float32(how: str) -> None:
    """In bf16 a bias of 0.5 loses steps of 0.001; `load_state_dict(assign=True)` made it bf16."""
    bias_E = cast_layer(how).router.get_buffer("bias_E")  # type: ignore[union-attr]
    assert bias_E.dtype == torch.float32
    assert torch.equal(bias_E, torch.full((5,), 0.501))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_bias_does_not_follow_the_default_dtype(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        layer = make()
        soft = build_router(RouterConfig(kind="soft"), 8, 4, 4, 0)
    finally:
        torch.set_default_dtype(torch.float32)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.router.get_buffer("bias_E").dtype == wide
    assert soft.get_buffer("bias_E").dtype == wide


def test_constant_weights_of_modules_stay_float32() -> None:
    """A third is 0.334 in bfloat16: modules on a bf16 model were summed to 1.002."""
    router = constant(*[1 / 3] * 3)(8, 0).bfloat16()
    assert router.get_buffer("weight_M").dtype == torch.float32
    assert float(router.get_buffer("weight_M").sum()) == pytest.approx(1, abs=1e-6)
