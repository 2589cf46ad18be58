"""Fewer experts: those of least load are left out, or merged into the ones that stay.

Load: the choices that the run has logged in its last steps (`layers[].load` in metrics.jsonl).

Prune (as Chen et al. 2022, "Task-Specific Expert Pruning"): in each MoE layer the N experts of
largest load stay, ties to the lower id, with their rows of the router in the order of their ids.
Where a token's experts all stay, so does its output. (But with a balance bias and softmax: scores
of fewer experts are larger beside the bias.)

Merge (after Li et al. 2024, "Merge, Then Compress"): an expert that goes is added to the one that
stays whose row of the router has the largest cosine with its own. The hidden units of an expert
have no order, so they are first matched with the units of the one that stays, largest cosine of
their weights first; then

    merged = sum of load * weights over the members / sum of load

and the router keeps the row of the one that stays.

A new run starts from it at step 0: training usually wins back what is lost.

Letters: E experts, N experts that stay, D width, F hidden width, U hidden units of an expert (F).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.config.expert_shapes import GATED
from dmoe.config.load import load as load_config
from dmoe.config.load import to_yaml
from dmoe.config.plugins import label
from dmoe.config.router_kinds import router_spec
from dmoe.config.rules import check, moe_blocks
from dmoe.config.schema import Config, ParallelConfig, ReplayConfig
from dmoe.conversion.new_run import first_extra, write_run
from dmoe.conversion.upcycle import compare_models
from dmoe.moe.experts import MLPExperts
from dmoe.moe.layer import MoE
from dmoe.runs.directory import RunDir
from dmoe.runs.metrics_log import read_metrics
from dmoe.train.restore import restore_model
from dmoe.train.tasks import task_of

LOGGED_STEPS = 10
"""Logged steps whose loads are summed."""


@dataclass(frozen=True)
class PruneResult:
    """Result of `prune`. The field names are the keys of `dmoe checkpoint prune --json`."""

    path: str
    """The new run directory."""
    source: str
    step: int
    kept: list[list[int]]
    """Ids of the experts that stay, by MoE layer."""
    load_kept: list[float]
    """Share of the choices that they had, by MoE layer."""
    merged: bool
    parameters_before: int
    parameters: int
    loss_before: float
    """Mean cross-entropy on the held-out data, in nats per token."""
    loss: float


def prune(
    source: RunDir,
    to: str | Path,
    keep: int,
    step: int | None = None,
    *,
    merge: bool = False,
) -> PruneResult:
    """Create a run whose MoE layers have the `keep` experts of largest load.

    Args:
        source: the run.
        to: the new run directory.
        keep: N.
        step: of the checkpoint; None: the newest that is intact.
        merge: add the experts that go to those that stay.

    Raises:
        ConfigError: layers whose experts cannot be left out, or a run directory in use.
        CheckpointError: there is no intact checkpoint, or no load was logged before it.
    """
    _check_prunable(load_config(source.path / "resolved.yaml"), keep)
    before = restore_model(source, step)
    config = replace(
        before.config,
        moe=replace(before.config.moe, num_experts=keep, replay=ReplayConfig()),
        train=replace(before.config.train, run_dir=str(to)),
    )
    check(replace(config, parallel=ParallelConfig(virtual_ranks=config.parallel.virtual_ranks)), 1)
    layers = before.model.moe_layers()
    loads = logged_loads(source, before.step, len(layers), layers[0].num_experts)
    task = task_of(config)
    data, model = task.open_data(), task.build_model()
    kept, shares = [], []
    _copy_outside(before.model, model)
    for old, new, load_E in zip(layers, model.moe_layers(), loads, strict=True):
        chosen = largest(load_E[: before.config.moe.num_experts], keep)
        assert isinstance(old, MoE)
        assert isinstance(new, MoE)
        copy_experts(old, new, chosen, load_E if merge else None)
        kept.append(chosen)
        shares.append(float(load_E[chosen].sum() / load_E.sum().clamp(min=1)))
    _, loss_before, loss = compare_models(
        before.model.cpu(), model, task, data, config.train.eval_sequences
    )
    origin = f"{source.path} step {before.step}"
    extra = first_extra(config, data, pruned_from=origin)
    path = write_run(config, to_yaml(config), model, extra)
    return PruneResult(
        str(path),
        str(source.path),
        before.step,
        kept,
        shares,
        merge,
        before.model.num_parameters().total,
        model.num_parameters().total,
        loss_before,
        loss,
    )


def _check_prunable(config: Config, keep: int) -> None:
    """Raise ConfigError unless every MoE layer stays one without some of its experts."""
    moe, spec = config.moe, router_spec(config.moe.router.kind)
    if config.train.task != "language_modelling":
        allowed = "has other heads of experts"
        raise ConfigError("train.task", config.train.task, allowed, "prune a language model")
    if config.model.source is not None:
        allowed = "is a published model, whose own router has a row for each of its experts"
        raise ConfigError("model.source", config.model.source, allowed, "prune dmoe's transformer")
    if not moe_blocks(config):
        raise ConfigError("RUN", "a dense run", "has no experts", "give one with MoE layers")
    if config.modular.bank != "none":
        allowed = "has modules that were trained beside all experts"
        raise ConfigError("modular.bank", config.modular.bank, allowed, "prune the run before it")
    if not spec.replayable or "groups" in spec.reads:
        allowed = "chooses by another rule than the rows of single experts"
        fix = "prune a run with moe.router.kind=top_k, noisy or adaptive"
        raise ConfigError("moe.router.kind", label(moe.router.kind), allowed, fix)
    if moe.experts.shapes:
        allowed = "has experts of different shapes, which moe.num_experts alone does not name"
        raise ConfigError("moe.experts.shapes", moe.experts.shapes, allowed, "use equal experts")
    if not moe.top_k <= keep < moe.num_experts:
        allowed = f"must be from moe.top_k={moe.top_k} to {moe.num_experts - 1}"
        raise ConfigError("--keep", keep, allowed, f"the run has {moe.num_experts} experts")


def logged_loads(source: RunDir, step: int, layers: int, experts: int) -> list[Tensor]:
    """Return the choices of each expert in the last logged steps, float64 [E] per MoE layer.

    Raises:
        CheckpointError: none was logged up to `step`.
    """
    lines = read_metrics(source.metrics) if source.metrics.exists() else []
    trained = [line for line in lines if line["event"] == "train" and line["step"] <= step]
    if not trained:
        raise CheckpointError(f"{source.path} has logged no load up to step {step}")
    total_LE = torch.zeros(layers, experts, dtype=torch.float64)
    for line in trained[-LOGGED_STEPS:]:
        total_LE += torch.tensor([layer["load"] for layer in line["layers"]], dtype=torch.float64)
    return list(total_LE)


def largest(load_E: Tensor, count: int) -> list[int]:
    """Return the ids of largest load, ties to the lower id, in ascending order."""
    order = load_E.sort(descending=True, stable=True).indices[:count]
    return sorted(order.tolist())


@torch.no_grad()
def _copy_outside(before: nn.Module, after: nn.Module) -> None:
    """Copy every parameter that is not of a router or of routed experts."""
    values = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        if ".router." not in name and ".experts." not in name:
            parameter.copy_(values[name])


@torch.no_grad()
def copy_experts(old: MoE, new: MoE, kept: list[int], load_E: Tensor | None = None) -> None:
    """Copy the experts that stay, and their rows of the router.

    Args:
        old: E experts.
        new: N experts.
        kept: ids in `old` of the experts of `new`.
        load_E: merge the others by these loads; None: leave them out.
    """
    assert isinstance(old.experts, MLPExperts)
    assert isinstance(new.experts, MLPExperts)
    rows = [*kept, *range(old.experts.num_experts, old.num_experts)]  # zero-cost ones stay
    state = new.router.state_dict()
    for name, value in old.router.state_dict().items():
        state[name].copy_(value[rows])
    groups: dict[int, list[int]] = {e: [e] for e in kept}
    if load_E is not None:
        gone = [e for e in range(old.experts.num_experts) if e not in groups]
        homes = _nearest(old.router.get_parameter("weight"), gone, kept)
        for e, home in zip(gone, homes, strict=True):
            groups[home].append(e)
    for index, members in enumerate(groups.values()):
        w_in, w_out = merge_experts(old.experts, members, load_E)
        new.experts.w_in[index].copy_(w_in)
        new.experts.w_out[index].copy_(w_out)


def _nearest(row_ED: Tensor, gone: list[int], kept: list[int]) -> list[int]:
    """Return for each expert that goes the one that stays with the most similar router row."""
    unit_ED = _normalized(row_ED)
    return [kept[int(n)] for n in (unit_ED[gone] @ unit_ED[kept].t()).argmax(1)]


def merge_experts(
    experts: MLPExperts, members: list[int], load_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return w_in [D, H] and w_out [F, M] of the mean of some experts, weighted by load.

    Args:
        experts: all of the layer.
        members: ids; the hidden units of the others are matched with those of the first.
        load_E: weights; may be None for one member.
    """
    first = members[0]
    if len(members) == 1:
        return experts.w_in[first], experts.w_out[first]
    assert load_E is not None
    share = load_E[members] / load_E[members].sum()
    if not torch.isfinite(share).all():  # no load at all
        share = torch.full_like(load_E[members], 1 / len(members))
    reference = _units(experts, first)
    mean = torch.zeros_like(reference)
    for weight, e in zip(share.tolist(), members, strict=True):
        unit_UX = _units(experts, e)
        mean += weight * unit_UX[match_units(reference, unit_UX)]
    halves, dim = _halves(experts), experts.w_in.shape[1]
    w_in = mean[:, : halves * dim].view(-1, halves, dim).permute(2, 1, 0).flatten(1)
    return w_in, mean[:, halves * dim :]


def match_units(reference_UX: Tensor, unit_UX: Tensor) -> Tensor:
    """Return, for each unit of the reference, the unit matched with it, int64 [U].

    Greedy: the pair of largest cosine first, until every unit has a partner. Cost: O(U^2 X).
    """
    cosine_UU = _normalized(reference_UX) @ _normalized(unit_UX).t()
    partner_U = torch.full((len(reference_UX),), -1)
    for _ in range(len(reference_UX)):
        place = int(cosine_UU.argmax())
        row, column = divmod(place, cosine_UU.shape[1])
        partner_U[row] = column
        cosine_UU[row], cosine_UU[:, column] = -torch.inf, -torch.inf
    return partner_U


def _units(experts: MLPExperts, e: int) -> Tensor:
    """Return the weights of each hidden unit, [U, (halves) D + M]."""
    width = experts.w_out.shape[1]
    w_in = experts.w_in[e].view(-1, _halves(experts), width).permute(2, 1, 0).flatten(1)
    return torch.cat([w_in, experts.w_out[e]], 1)


def _halves(experts: MLPExperts) -> int:
    return 2 if experts.kind in GATED else 1


def _normalized(row_NX: Tensor) -> Tensor:
    """Return rows of length 1."""
    length_N1: Tensor = row_NX.norm(dim=1, keepdim=True)
    return row_NX / length_N1.clamp(min=1e-20)
