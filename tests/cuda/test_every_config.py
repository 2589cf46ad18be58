"""Forward and backward of every shipped config on the branch of CUDA, on the meta device.

There a value cannot be read, and torch checks dtypes and strides as it does for a GPU. Layers are
cut to two; widths, experts, routers, capacities and modules are the config's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import gcd
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from dmoe.config.load import load
from dmoe.config.schema import Config
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.mesh import ParallelMesh, build_mesh
from dmoe.models.base import Model, ModelOutput
from dmoe.moe.metrics import decisions, router_metrics
from dmoe.moe.routing import TokenContext
from dmoe.train.modular.attach import attach_modules, select_trainable_parameters
from dmoe.train.tasks import task_of

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").rglob("*.yaml"))
SEQUENCES, RECEIVED = 8, 2
"""Sequences of a forward; rows that a rank sends to and receives from each rank."""

NO_DETERMINISTIC_KERNEL = {
    *("cumsum_", "histc", "kthvalue", "put_", "grid_sampler_2d", "nll_loss2d_forward"),
    *("max_unpool2d", "replication_pad1d_backward", "reflection_pad1d_backward"),
    *("upsample_linear1d_backward", "adaptive_avg_pool2d_backward", "ctc_loss_backward"),
}
"""Operators that torch refuses on CUDA under `use_deterministic_algorithms`, some with conditions
below; from the list in torch/__init__.py."""


class CheckedOperators(TorchDispatchMode):
    """Asserts that CUDA has each operator, in bf16, in every torch from 2.11 on.

    And that it has a deterministic one, except for the backward of attention, which chooses by
    itself.
    """

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        assert name != "_embedding_bag_per_sample_weights_backward", "no bf16 before torch 2.13"
        assert name not in NO_DETERMINISTIC_KERNEL, f"{name} has no deterministic kernel"
        is_float = bool(args) and isinstance(args[0], Tensor) and args[0].is_floating_point()
        assert not (name == "cumsum" and is_float), "cumsum of floats has no deterministic kernel"
        assert not (name == "bincount" and len(args) > 1 and args[1] is not None)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def fake_world() -> Iterator[None]:
    """torch's fake process group: rank 3 of 8, whose collectives move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=8)
    yield
    dist.destroy_process_group()


@pytest.fixture
def known_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the host reads that a layer is allowed equal counts: the meta device has none."""

    def counts(tensor: Tensor) -> list[Any]:
        if tensor.dim() > 1:
            return [counts(row) for row in tensor]
        return [RECEIVED] * len(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counts)
    monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: RECEIVED)


def config_of(path: Path) -> Config:
    text = path.read_text(encoding="utf-8")
    short = [] if "classification" in text else ["data.seq_len=16"]
    return load(path, ["model.layers=2", *short])


def model_of(config: Config, mesh: ParallelMesh) -> Model:
    """The model as the engine builds it, in bf16, since the meta device has no autocast."""
    with torch.device("meta"):
        model = task_of(config).build_model(config.parallel.virtual_ranks, config.train.recompute)
        attach_modules(model, config, config.parallel.virtual_ranks)
    model = model.bfloat16()
    shard_experts(model, mesh)
    select_trainable_parameters(model, config)
    return model


def run(model: Model, config: Config, training: bool) -> ModelOutput:
    batch = task_of(config).dummy_batch(SEQUENCES)
    input, target, label_B = (part.to("meta") for part in batch)
    input = input.bfloat16() if input.is_floating_point() else input
    context = TokenContext(
        label_T=label_B.repeat_interleave(target.shape[1], output_size=target.numel()),
        noise_key=(0, 0),
        metrics_fn=router_metrics if training else decisions,
    )
    if not training:
        context = replace(context, valid_T=torch.ones_like(context.label_T, dtype=torch.bool))
    output: ModelOutput = model.train(training)(input, target, context)
    return output


def check(config: Config, mesh: ParallelMesh) -> None:
    model = model_of(config, mesh)
    with CheckedOperators():
        output = run(model, config, training=True)
        assert output.loss_sum is not None
        losses = [value for aux in (*output.aux, *output.module_aux) for value in aux.values()]
        (output.loss_sum + sum(losses, torch.zeros((), device="meta"))).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert not [name for name, p in trained.items() if p.grad is None]
    with torch.no_grad(), CheckedOperators():
        assert run(model, config, training=False).loss_T is not None


@pytest.mark.usefixtures("cuda_branch", "known_counts")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_one_gpu(path: Path) -> None:
    """`configs/seeds/soft.yaml` and `budget_digits.yaml` died on any machine with a GPU.

    `train.device: auto` takes it, and their last layer is as wide as there are classes: 10. On
    torch below 2.13 the backward of every bf16 layer used a kernel that is not there.
    """
    check(config_of(path), ParallelMesh())


@pytest.mark.usefixtures("cuda_branch", "known_counts", "fake_world")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_rank_3_of_8(path: Path) -> None:
    """With the largest EP size that divides 8 ranks, the experts and the modules."""
    config = config_of(path)
    experts = config.moe.num_experts
    modules = config.modular.modules if config.modular.bank != "none" else experts
    if config.modular.aggregation == "parameter_mean":
        modules = 1
    ep = gcd(8, experts, modules)
    check(config, build_mesh(ep, torch.device("meta")))
