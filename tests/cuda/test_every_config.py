"""Forward and backward of every shipped config on the branch of CUDA, on the meta device.

There a value cannot be read, and torch checks dtypes and strides as it does for a GPU. Layers are
cut to two; widths, experts, routers, capacities and modules are the config's.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from math import gcd
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.schema import Config
from dmoe.distributed.expert_parallel import moe_layers, shard_experts
from dmoe.distributed.mesh import ParallelMesh, build_mesh
from dmoe.models.base import Model, ModelOutput
from dmoe.moe.layer import MoE
from dmoe.moe.metrics import decisions, router_metrics
from dmoe.moe.routing import TokenContext
from dmoe.train.modular.attach import attach_modules, select_trainable_parameters
from dmoe.train.tasks import task_of

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").rglob("*.yaml"))
SEQUENCES = 8
"""Sequences of a forward."""

PADDED = ("moe.exchange=padded", "moe.capacity.factor=1.25")

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


def config_of(path: Path, *overrides: str) -> Config:
    text = path.read_text(encoding="utf-8")
    short = [] if "classification" in text else ["data.seq_len=16"]
    return load(path, ["model.layers=2", *short, *overrides])


def ep_of(config: Config) -> int:
    """The largest EP size that divides 8 ranks, the experts and the modules."""
    experts = config.moe.num_experts
    modules = config.modular.modules if config.modular.bank != "none" else experts
    return gcd(8, experts, 1 if config.modular.aggregation == "parameter_mean" else modules)


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
    input, target, label_B = (part.to("meta") for part in batch[:3])
    input = input.bfloat16() if input.is_floating_point() else input
    context = TokenContext(
        label_T=label_B.repeat_interleave(target.shape[1], output_size=target.numel()),
        noise_key=(0, 0),
        metrics_fn=router_metrics if training else decisions,
    )
    if not training or batch.valid_BS is not None:
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
    check(config, build_mesh(ep_of(config), torch.device("meta")))


def layers_of_configs() -> list[tuple[str, str]]:
    """Configs with a MoE layer or modules of shapes of their own, by name, and their exchanges."""
    found, seen = list[tuple[str, str]](), set[str]()
    for path in CONFIGS:
        config = config_of(path)
        key = f"{config.model.dim} {config.moe} {config.modular} {config.train.task}"
        if key in seen:
            continue
        seen.add(key)
        found += [(path.stem, "packed")]
        with suppress(ConfigError):
            config_of(path, *PADDED)
            found += [(path.stem, "padded")]
    return found


@pytest.mark.usefixtures("cuda_branch", "known_counts", "fake_world")
@pytest.mark.parametrize("known_counts", [0], indirect=True)
@pytest.mark.parametrize(("name", "exchange"), layers_of_configs())
def test_a_rank_that_no_token_is_sent_to(name: str, exchange: str) -> None:
    """Every shape of configs/ in both exchanges; a rank without rows has gradients all the same."""
    (path,) = (path for path in CONFIGS if path.stem == name)
    config = config_of(path, *(PADDED if exchange == "padded" else ()))
    model = model_of(config, build_mesh(ep_of(config), torch.device("meta")))
    layers = {layer.layer: layer for layer in moe_layers(model) if isinstance(layer, MoE)}
    for layer in list(layers.values())[:1]:
        assert (layer.padded is None) == (exchange == "packed")
        x = torch.empty(SEQUENCES, 16, layer.dim, dtype=torch.bfloat16, device="meta")
        labels = torch.zeros(SEQUENCES * 16, dtype=torch.int64, device="meta")
        with CheckedOperators():
            output = layer(x.requires_grad_(), TokenContext(label_T=labels, noise_key=(0, 0)))
            (output.y.sum() + sum(output.aux.values())).backward()
        trained = [p for p in layer.experts.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.shape == p.shape for p in trained)
