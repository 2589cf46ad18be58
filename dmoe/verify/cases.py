"""Cases that `verify` compares, and the small config that they run.

The reference is one process with the naive layer. The real layer is compared with it on one
process, and for every number of ranks, EP size, exchange and data-parallel mode. The number of
token groups (ranks times virtual ranks) is the same in all cases, because `capacity.group: rank`
and losses of level `micro_batch` depend on it.

`shrink` keeps everything that decides how the config is trained: router, capacity, load balancing,
kind of experts, shared experts, form of attention, sparse blocks, optimizer. It changes widths,
depth, a number of experts above 16, batch and data (synthetic, so that nothing is read). `verify`
sets the precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from dmoe.config.datasets import DATASETS
from dmoe.config.errors import ConfigError
from dmoe.config.expert_shapes import expert_shapes, multiply_adds
from dmoe.config.router_kinds import router_spec
from dmoe.config.rules import can_share, check, check_two_nodes, moe_widths, shares_something
from dmoe.config.schema import Config, DataConfig, ModelConfig, ModularConfig, MoEConfig
from dmoe.data.token_streams import masks_by_default
from dmoe.train.modular.attach import BANK_FIELDS
from dmoe.verify.naive.plugins import without_reference

Exchange = Literal["packed", "padded"]
Mode = Literal["ddp", "fsdp"]

DIM, HEADS, EXPERT_DIM, SEQ_LEN = 32, 4, 24, 16
MAX_EXPERTS, MAX_ZERO_COST = 16, 2
MODULE_WIDTHS = {"rank": 4, "hidden": 6, "length": 3}
NUM_STEPS = 2
"""More than one, so that something kept from a step that should not be shows in the next."""
ACCUMULATION_STEPS = 3
"""More than two, so that the sum of the earlier steps is not the latest of them."""
MICRO_BATCH = 2
"""More than one, so that sequences and token groups differ."""


@dataclass(frozen=True)
class Case:
    """One run to compare: number of ranks, EP size, exchange and data-parallel mode."""

    world: int
    ep: int
    virtual_ranks: int
    exchange: Exchange
    mode: Mode
    recompute: bool = False
    tied: bool = False
    """Every second router row is zero, so that scores are equal to the last bit."""
    naive: bool = False
    cuda: bool = False

    def __str__(self) -> str:
        if self.naive:
            return f"1 process, naive layer{' with tied scores' if self.tied else ''}"
        ranks = "1 process" if self.world == 1 else f"{self.world} ranks EP={self.ep}"
        special = " recompute" if self.recompute else " tied scores" if self.tied else ""
        return f"{ranks} {self.exchange} {self.mode}{special}{' on cuda' if self.cuda else ''}"

    @property
    def device(self) -> str:
        return "cuda" if self.cuda else "cpu"

    def config(self, base: Config) -> Config:
        """Return `base` with this case's settings."""
        train = base.train
        if self.recompute or train.recompute == "block":
            train = replace(train, recompute="block" if self.recompute else "none")
        return replace(
            base,
            parallel=replace(
                base.parallel,
                ep=self.ep,
                virtual_ranks=self.virtual_ranks,
                mode=self.mode,
                backend="nccl" if self.cuda else "gloo",
            ),
            moe=replace(base.moe, exchange=self.exchange),
            train=replace(train, device="cuda" if self.cuda else "cpu"),
        )


@dataclass(frozen=True)
class CasePlan:
    """Cases to run."""

    cases: list[Case]
    refused: dict[str, str]
    """Reason for every combination that the config does not allow."""


def reference_case(groups: int) -> Case:
    """Return the case of one process with the naive layer and `groups` token groups."""
    return Case(1, 1, groups, "packed", "ddp", naive=True)


def _check_gpus(device: str, worlds: Sequence[int]) -> None:
    """Raise ConfigError unless each rank has a device of its own."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cuda" and not gpus:
        raise ConfigError("--device", device, "no GPU is visible", "use --device cpu")
    if device == "cuda" and max(worlds) > gpus:
        fits = ",".join(str(world) for world in worlds if world <= gpus) or "1"
        allowed = f"each rank needs a GPU, and {gpus} {'is' if gpus == 1 else 'are'} visible"
        raise ConfigError("--worlds", ",".join(map(str, worlds)), allowed, f"use {fits}")


def plan_cases(config: Config, worlds: list[int], groups: int, device: str = "cpu") -> CasePlan:
    """Return all cases for these numbers of ranks; `groups` is a multiple of each.

    Raises ConfigError where a rank has no `device` of its own.
    """
    _check_gpus(device, worlds)
    cases, refused = list[Case](), without_reference(config)
    if config.moe.replay.from_ is not None:
        refused["moe.replay.from"] = (
            "the choices belong to the tokens of the run, and the cases read others: they route"
        )
    exchanges: list[Exchange] = ["packed"]
    if moe_widths(config):
        if config.moe.capacity.factor is None:
            refused["padded"] = (
                "a dropless config has no fixed number of slots (moe.capacity.factor is null)"
            )
        else:
            exchanges.append("padded")
    for world in worlds:
        for planned in _cases_of_world(config, world, groups, exchanges):
            case = replace(planned, cuda=device == "cuda")
            try:
                check_two_nodes(config, case.ep)
                check(case.config(config), world)
                cases.append(case)
            except ConfigError as error:
                refused[str(case)] = str(error)
    largest = [case for case in cases if case.world == max(worlds)]
    if largest:  # recomputed activations must not be counted twice
        cases.append(replace(largest[0], ep=max(case.ep for case in largest), recompute=True))
        own = config.model.source is None and router_spec(config.moe.router.kind).learned
        if own and moe_widths(config):
            cases.append(replace(largest[-1], tied=True))
    return CasePlan(cases, refused)


def _cases_of_world(
    config: Config, world: int, groups: int, exchanges: list[Exchange]
) -> list[Case]:
    sizes = [n for n in range(1, world + 1) if world % n == 0 and (n == 1 or _can_shard(config, n))]
    modes: list[Mode] = ["ddp"] if world == 1 else ["ddp", "fsdp"]
    return [
        Case(world, ep, groups // world, exchange, mode)
        for ep in reversed(sizes)
        for mode in modes
        for exchange in exchanges
    ]


def _can_shard(config: Config, ep: int) -> bool:
    return shares_something(config) and can_share(config, ep)


def prepare(config: Config, groups: int) -> Config:
    """Return `config` with synthetic data, three accumulation steps of two sequences per token
    group, and float32, on the wire too. The model is not changed."""
    full = replace(config.parallel.exchange, wire="full", library="torch")
    parallel = replace(config.parallel, backend="gloo", exchange=full)
    if parallel.placement.kind == "periodic":  # experts move after every step
        parallel = replace(parallel, placement=replace(parallel.placement, every=1))
    return replace(
        config,
        data=_data(config),
        modular=replace(config.modular, core=None),  # no base model is loaded
        train=replace(
            config.train,
            steps=4,
            global_batch=groups * ACCUMULATION_STEPS * MICRO_BATCH,
            micro_batch=MICRO_BATCH,
            precision="fp32",
            device="cpu",
            eval_sequences=MICRO_BATCH * groups + 1,  # so that the second batch has padding
        ),
        optim=replace(config.optim, warmup=0),
        parallel=parallel,
    )


def _data(config: Config) -> DataConfig:
    """Return synthetic data: tokens, or a table with as many streams as the config has."""
    data = replace(
        config.data,
        tokenizer="bytes",
        tokenizer_vocab=None,
        tokenizer_options={},
        source_options={},
        chat_template=None,
        seq_len=min(config.data.seq_len, SEQ_LEN),
    )
    data = replace(data, temperature=None, weights={}, eval_source=None, validation_source=None)
    data = replace(data, text_field=None, label_field=None, columns=[], classes=[])
    if config.data.document_mask is None and masks_by_default(config.data.source):
        data = replace(data, document_mask=True)  # the default of prepared text
    if config.train.task == "language_modelling":
        return replace(data, source="synthetic:zipf")
    streams = list(DATASETS["synthetic:clusters"].streams)[: max(1, len(config.data.streams))]
    return replace(data, source="synthetic:clusters", streams=streams)


def shrink(config: Config) -> Config:
    """Return `config` with narrow layers; the module's docstring lists what is kept."""
    return replace(
        config, model=_model(config.model), moe=_moe(config.moe), modular=_modular(config.modular)
    )


def _modular(modular: ModularConfig) -> ModularConfig:
    """Return narrow modules; their number stays, because routing and exchange depend on it."""
    small = {
        name: min(getattr(modular, name), MODULE_WIDTHS[name])
        for name in BANK_FIELDS.get(modular.bank, ())
        if name in MODULE_WIDTHS
    }
    return replace(modular, **small)


def _model(model: ModelConfig) -> ModelConfig:
    every, first = min(model.moe_every, 2), min(model.dense_first, 1)
    kv_heads = None if model.kv_heads is None else max(1, HEADS * model.kv_heads // model.heads)
    return replace(
        model,
        dim=DIM,
        heads=HEADS,
        kv_heads=kv_heads,
        head_dim=None,
        dense_dim=None if model.dense_dim is None else 2 * DIM,
        layers=min(model.layers, max(2, first + max(1, every))),
        moe_every=every,
        dense_first=first,
        # with smaller weights, narrow layers would route all tokens alike
        init_std=max(model.init_std, 0.1),
    )


def _moe(moe: MoEConfig) -> MoEConfig:
    experts = min(moe.num_experts, MAX_EXPERTS)
    zero_cost = sum(
        min(number, MAX_ZERO_COST)
        for number in (moe.experts.zero, moe.experts.copy, moe.experts.constant)
    )
    router = moe.router
    if router.groups > 1 and experts != moe.num_experts:
        groups = min(router.groups, 4)
        router = replace(
            router, groups=groups, topk_groups=max(1, min(router.topk_groups, groups // 2))
        )
    reachable = experts if router.groups == 1 else experts // router.groups * router.topk_groups
    top_k = min(moe.top_k, experts + zero_cost)
    if experts != moe.num_experts:
        top_k = max(2, min(moe.top_k, reachable // 2)) if moe.top_k > 1 else 1
    shared_dim = None if moe.experts.shared_dim is None else EXPERT_DIM
    widest = max([width for shape in moe.experts.shapes for width in shape], default=EXPERT_DIM)
    shapes = [
        [max(2, width * EXPERT_DIM // max(EXPERT_DIM, widest)) for width in shape]
        for shape in moe.experts.shapes
    ]
    small = replace(
        moe,
        num_experts=experts,
        top_k=top_k,
        expert_dim=EXPERT_DIM,
        router=replace(router, k_min=min(router.k_min, top_k)),
        experts=replace(
            moe.experts,
            shared_dim=shared_dim,
            shapes=shapes[:experts],
            **{
                name: min(getattr(moe.experts, name), MAX_ZERO_COST)
                for name in ("zero", "copy", "constant")
            },
        ),
    )
    if not router_spec(router.kind).has_budget:
        return small
    return replace(small, router=replace(small.router, budget=_budget(small)))


def _budget(moe: MoEConfig) -> float:
    """Return the budget, at least the cost of the cheapest expert.

    Among narrow experts, a linear one has a larger share of the cost than in the full config.
    """
    cost = [multiply_adds(shape, DIM, DIM, moe.experts.kind) for shape in expert_shapes(moe)]
    return max(moe.router.budget, min(cost) / sum(cost))
