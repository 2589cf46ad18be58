"""Sparse upcycling (Komatsuzaki et al. 2022, "Sparse Upcycling"): a trained dense model becomes the start of a mixture of experts.

    expert_e = the dense feed-forward, for every e        router = drawn anew        everything else = as it was

With weights that sum to 1, `sum_k w_k * f(x) = f(x)`: at step 0 the mixture says what the dense model said, whatever the router
chooses. So the first step sends the router no gradient of the loss: all experts agree, and only the balance losses move it. What makes
the experts differ is that each is trained on the tokens that come to it, scaled by their weights; no noise is added to the copies.

The optimizer starts afresh, as in the paper's default; so does the schedule.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import dmoe
from dmoe.checkpoint import list_steps, save
from dmoe.config.errors import ConfigError
from dmoe.config.load import load as load_config
from dmoe.config.rules import batching, check, moe_blocks
from dmoe.config.schema import Config, ParallelConfig
from dmoe.data import open_tokenizer
from dmoe.distributed.init import ProcessInfo
from dmoe.distributed.mesh import ParallelMesh
from dmoe.distributed.state_dict import model_state, optimizer_state
from dmoe.models.base import Model
from dmoe.models.layers import active_hidden_dim
from dmoe.moe.experts import FeedForward, MLPExperts
from dmoe.moe.layer import MoE
from dmoe.moe.routing import TokenContext
from dmoe.runs.directory import RunDir
from dmoe.train import optim as optimizers
from dmoe.train.restore import Restored, restore
from dmoe.train.run_session import open_session
from dmoe.train.step_guard import StepGuard
from dmoe.train.tasks import Data, Task, task_of

SHAPED_BY_IT = ("moe_every", "dense_first", "dense_dim", "init_std")
"""Fields of `model` that the two may differ in: which blocks are sparse, and how the routers are drawn."""
ALWAYS_ONE = ("noisy", "soft", "fixed", "hash")
"""Routers whose weights sum to `scale` by construction."""
PROBE_SEQUENCES = 4


@dataclass(frozen=True)
class Upcycled:
    """What was made. Widths and counts are those of the new model."""

    path: str
    """The new run directory."""
    source: str
    step: int
    """Of the dense run."""
    layers: list[str]
    """The feed-forwards that have become mixtures, by name."""
    experts: int
    dense_parameters: int
    parameters: int
    difference: float
    """The largest of any logit, on a few held-out sequences; rounding, unless an evaluation capacity drops tokens."""


def upcycle(source: RunDir, config: Config, given: str, step: int | None = None) -> Upcycled:
    """Make the run directory of `config`, with a checkpoint of step 0 that `dmoe train` goes on from, at any world and EP size.

    Args:
        source: a run of a dense model; `step`: which of its checkpoints, by default the newest whole one.
        given: the text of the config file, for the record.

    Raises: ConfigError for two models that do not fit, or a directory in use; CheckpointError if there is no whole checkpoint. Before
        anything is written, but for the directory itself.
    Cost: one process; memory of the dense weights, and three times the sparse ones (Adam's moments are saved as zeros).
    """
    check(replace(config, parallel=ParallelConfig(virtual_ranks=config.parallel.virtual_ranks)), 1)
    check_upcycle(load_config(source.path / "resolved.yaml"), config)
    dense, task = restore(source, step), task_of(config)
    data, model = task.open(), task.model()
    model.initialize(config.train.seed)
    layers = copy_weights(dense.model.cpu(), model)
    difference = _difference(dense, model, task, data)
    path = _write(config, given, model, _extra(config, data, f"{source.path} step {dense.step}"))
    before, after = dense.model.num_parameters().total, model.num_parameters().total
    return Upcycled(
        str(path),
        str(source.path),
        dense.step,
        layers,
        config.moe.num_experts,
        before,
        after,
        difference,
    )


def check_upcycle(dense: Config, sparse: Config) -> None:
    """Refuse two configs of which the second cannot begin with the first one's outputs. Raises ConfigError naming the field."""
    for config in (dense, sparse):
        if config.train.task != "language_modelling":
            raise ConfigError(
                "train.task",
                config.train.task,
                "cannot be upcycled",
                "use language_modelling in both runs",
            )
        if config.modular.bank != "none":
            allowed = "adds modules, which are neither copied nor made here, so the outputs would not be equal"
            raise ConfigError(
                "modular.bank", config.modular.bank, allowed, "leave it out of both runs"
            )
    if moe_blocks(dense):
        raise ConfigError(
            "RUN",
            "model.moe_every=" + str(dense.model.moe_every),
            "is not dense",
            "give one with model.moe_every=0",
        )
    if not moe_blocks(sparse):
        raise ConfigError(
            "model.moe_every",
            sparse.model.moe_every,
            "leaves no block to upcycle",
            "use 1, or 2 for every other",
        )
    for name, value in asdict(sparse.model).items():
        was = getattr(dense.model, name)
        if name not in SHAPED_BY_IT and value != was:
            raise ConfigError(f"model.{name}", value, f"the dense run has {was}", "use that")
    if open_tokenizer(dense.data).fingerprint != open_tokenizer(sparse.data).fingerprint:
        raise ConfigError(
            "data.tokenizer",
            sparse.data.tokenizer,
            f"the dense run has {dense.data.tokenizer}",
            "use that",
        )
    _check_experts(dense, sparse)
    _check_weights(sparse)


def copy_weights(dense: Model, sparse: Model) -> list[str]:
    """Fill `sparse`: every expert with a copy of the dense feed-forward in its place, all else as it is, routers untouched.

    Returns the names of the mixtures. The models must fit, as `check_upcycle` sees to.
    """
    mixtures = {name: module for name, module in sparse.named_modules() if isinstance(module, MoE)}
    known = dict(dense.named_parameters())
    with torch.no_grad():
        for name, layer in mixtures.items():
            origin, experts = dense.get_submodule(name), layer.experts
            assert isinstance(origin, FeedForward)
            assert isinstance(experts, MLPExperts), "experts of one shape"
            experts.w_in.copy_(
                origin.w_in.weight.t()
            )  # to all experts: [D, H] is spread over [E, D, H]
            experts.w_out.copy_(origin.w_out.weight.t())
        for name, parameter in sparse.named_parameters():
            if not name.startswith(tuple(f"{mixture}." for mixture in mixtures)):
                parameter.copy_(known[name])
    return list(mixtures)


def _check_experts(dense: Config, sparse: Config) -> None:
    experts, width = sparse.moe.experts, _dense_dim(dense)
    if experts.kind != dense.moe.experts.kind:
        raise ConfigError(
            "moe.experts.kind",
            experts.kind,
            f"the dense run has {dense.moe.experts.kind}",
            "use that",
        )
    for name in ("shared", "shapes", "zero", "copy", "constant"):
        if getattr(experts, name):
            allowed = "is no copy of the dense feed-forward, so the outputs would not be equal"
            raise ConfigError(
                f"moe.experts.{name}",
                getattr(experts, name),
                allowed,
                f"leave moe.experts.{name} out",
            )
    if sparse.moe.expert_dim != width:
        allowed = f"must be {width}, the width of the dense feed-forwards that are copied"
        raise ConfigError("moe.expert_dim", sparse.moe.expert_dim, allowed, f"use {width}")
    if len(moe_blocks(sparse)) < sparse.model.layers and _dense_dim(sparse) != width:
        allowed = f"must be {width} in the blocks that stay dense, as in the dense run"
        raise ConfigError("model.dense_dim", _dense_dim(sparse), allowed, f"use {width}")


def _check_weights(sparse: Config) -> None:
    """Whether the weights of any token sum to 1."""
    router, kind = sparse.moe.router, sparse.moe.router.kind
    if kind in ("expert_choice", "budget"):
        allowed = "gives some tokens no expert, so the outputs would not be equal"
        raise ConfigError("moe.router.kind", kind, allowed, "use top_k")
    if router.scale != 1:
        raise ConfigError(
            "moe.router.scale", router.scale, "multiplies what the dense model computes", "use 1"
        )
    if (
        kind in ALWAYS_ONE
        or router.renormalize
        or (router.weights_from == "chosen" and router.score == "softmax")
    ):
        return
    allowed = "makes weights that sum to less than 1, so the outputs would not be equal"
    fix = "set it to true" if sparse.moe.top_k > 1 else "set it to true, with moe.top_k=2 or more"
    raise ConfigError("moe.router.renormalize", False, allowed, fix)


def _dense_dim(config: Config) -> int:
    return (
        active_hidden_dim(config.moe) if config.model.dense_dim is None else config.model.dense_dim
    )


@torch.no_grad()
def _difference(dense: Restored, sparse: Model, task: Task, data: Data) -> float:
    there = data.held_out.sequences
    samples = task.samples(
        data.held_out, 0, PROBE_SEQUENCES if there is None else min(PROBE_SEQUENCES, there)
    )
    context = TokenContext(label_T=samples.label_B.repeat_interleave(samples.input.shape[1]))
    before, after = (
        model.eval()(samples.input, None, context).logits for model in (dense.model, sparse)
    )
    return float((before - after).abs().amax())


def _write(config: Config, given: str, model: Model, extra: dict[str, Any]) -> Path:
    """The run directory with everything in it; refused if it has a checkpoint already."""
    run = open_session(config, ProcessInfo(0, 1, 0, torch.device("cpu")))
    try:
        if list_steps(run.directory.checkpoints):
            raise ConfigError(
                "train.run_dir",
                config.train.run_dir,
                "holds a run with checkpoints",
                "name a new directory",
            )
        run.record(config, given)
        state = model_state(model, ParallelMesh()) | optimizer_state(
            model, optimizers.build(model, config.optim), ParallelMesh()
        )
        save(run.directory.checkpoints, 0, state, extra)
    finally:
        run.close()
    return run.directory.path


def _extra(config: Config, data: Data, origin: str) -> dict[str, Any]:
    """What a trainer's checkpoint of step 0 would say, and where the weights are from."""
    return {
        "step": 0,
        "tokens": 0,
        "config": asdict(config),
        "topology": {
            "world": 1,
            "ep": 1,
            "virtual_ranks": config.parallel.virtual_ranks,
            "micro_batch": batching(config, 1).micro_batch,
        },
        "data": data.fingerprint,
        "guard": StepGuard(config.guard).state(),
        "scaler": None,
        "versions": {"dmoe": dmoe.__version__, "torch": torch.__version__},
        "upcycled_from": origin,
    }
