"""The config with narrow layers and a handful of tokens; whatever decides *how* it is trained is kept.

Kept: router, capacity, balance, experts' kind, shared experts, attention's form, which blocks are sparse, the optimizer. Changed:
widths, depth, number of experts above 16, batch, data (synthetic tokens: no corpus is read), precision (set by verify).
"""

from __future__ import annotations

from dataclasses import replace

from dmoe.config.datasets import CATALOGUE
from dmoe.config.expert_shapes import multiply_adds, shapes_of
from dmoe.config.schema import Config, DataConfig, ModelConfig, ModularConfig, MoEConfig
from dmoe.train.modular.attach import OPTIONS

DIM, HEADS, EXPERT_DIM, MOST_EXPERTS, MOST_ZERO_COST, SEQ_LEN = 32, 4, 24, 16, 2, 16
WIDTHS = {"rank": 4, "hidden": 6, "length": 3}  # of modules
ACCUMULATION = 3  # more than one earlier step, so that their sum is not the last of them
MICRO_BATCH = 2  # sequences and groups must not be the same thing


def prepare(config: Config, groups: int) -> Config:
    """Data, batch and precision of a verification: three accumulation steps of two sequences a group. Widths stay."""
    return replace(
        config,
        data=_data(config),
        modular=replace(config.modular, core=None),  # every weight is drawn
        train=replace(
            config.train,
            steps=4,
            global_batch=groups * ACCUMULATION * MICRO_BATCH,
            micro_batch=MICRO_BATCH,
            precision="fp32",
            device="cpu",
            eval_sequences=groups,
        ),
        optim=replace(config.optim, warmup=0),
        parallel=replace(config.parallel, backend="gloo"),
    )


def _data(config: Config) -> DataConfig:
    """Made up, so that nothing is read: tokens, or a table with as many streams."""
    data = replace(
        config.data,
        tokenizer="bytes",
        tokenizer_vocab=None,
        seq_len=min(config.data.seq_len, SEQ_LEN),
    )
    data = replace(data, temperature=None, eval_source=None)
    if config.train.task == "language_modelling":
        return replace(data, source="synthetic:zipf")
    streams = list(CATALOGUE["synthetic:clusters"].streams)
    return replace(
        data, source="synthetic:clusters", streams=streams[: max(1, len(config.data.streams))]
    )


def shrink(config: Config) -> Config:
    """Narrow layers; see the module's docstring for what is kept."""
    return replace(
        config, model=_model(config.model), moe=_moe(config.moe), modular=_modular(config.modular)
    )


def _modular(modular: ModularConfig) -> ModularConfig:
    """Narrow modules, as many as there are: routing and exchange depend on their number."""
    small = {
        name: min(getattr(modular, name), WIDTHS[name])
        for name in OPTIONS.get(modular.bank, ())
        if name in WIDTHS
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
        init_std=max(
            model.init_std, 0.1
        ),  # narrow layers need larger weights for routing to differ between tokens
    )


def _moe(moe: MoEConfig) -> MoEConfig:
    experts = moe.num_experts if moe.num_experts <= MOST_EXPERTS else MOST_EXPERTS
    zero_cost = sum(
        min(number, MOST_ZERO_COST)
        for number in (moe.experts.zero, moe.experts.copy, moe.experts.constant)
    )
    router = moe.router
    if router.groups > 1 and experts != moe.num_experts:
        groups = min(router.groups, 4)
        router = replace(
            router, groups=groups, topk_groups=max(1, min(router.topk_groups, groups // 2))
        )
    most = experts if router.groups == 1 else experts // router.groups * router.topk_groups
    top_k = min(moe.top_k, experts + zero_cost)
    if experts != moe.num_experts:
        top_k = max(2, min(moe.top_k, most // 2)) if moe.top_k > 1 else 1
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
                name: min(getattr(moe.experts, name), MOST_ZERO_COST)
                for name in ("zero", "copy", "constant")
            },
        ),
    )
    return (
        small
        if router.kind != "budget"
        else replace(small, router=replace(small.router, budget=_budget(small)))
    )


def _budget(moe: MoEConfig) -> float:
    """The budget, or what the cheapest expert costs: among narrow ones a linear map takes a larger share."""
    work = [multiply_adds(shape, DIM, DIM, moe.experts.kind) for shape in shapes_of(moe)]
    return max(moe.router.budget, min(work) / sum(work))
