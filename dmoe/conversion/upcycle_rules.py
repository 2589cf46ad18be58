"""What a mixture must be to start with the outputs of a dense model (`upcycle.py`)."""

from __future__ import annotations

from dmoe.config.errors import ConfigError
from dmoe.config.plugins import label
from dmoe.config.router_kinds import router_spec
from dmoe.config.rules import moe_blocks
from dmoe.config.schema import Config, MoEConfig
from dmoe.conversion.expert_copies import COPIES, ExpertInit
from dmoe.data import open_tokenizer
from dmoe.models.layers import dense_hidden_dim

FREE_MODEL_FIELDS = ("moe_every", "dense_first", "dense_dim", "init_std")
"""Fields of `model` that may differ: which blocks are sparse, and the init of the routers."""


def check_upcycle(dense: Config, sparse: Config, init: ExpertInit = COPIES) -> None:
    """Raise ConfigError unless the sparse model can start with the outputs of the dense one.

    Before `init.drop` and `init.noise`, which change them.
    """
    for config in (dense, sparse):
        if config.train.task != "language_modelling":
            raise ConfigError(
                "train.task",
                config.train.task,
                "cannot be upcycled",
                "use language_modelling in both runs",
            )
        if config.model.source is not None:
            allowed = "is a published mixture, and not made of a dense model"
            fix = "leave it out: RUN may be the directory of a published dense model"
            raise ConfigError("model.source", config.model.source, allowed, fix)
        if config.modular.bank != "none":
            raise ConfigError(
                "modular.bank",
                config.modular.bank,
                "adds modules, which upcycling does not copy, so the outputs would not be equal",
                "leave it out of both runs",
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
    for name, value in vars(sparse.model).items():
        was = getattr(dense.model, name)
        if name not in FREE_MODEL_FIELDS and value != was:
            raise ConfigError(f"model.{name}", value, f"the dense run has {was}", "use that")
    if open_tokenizer(dense.data).fingerprint != open_tokenizer(sparse.data).fingerprint:
        raise ConfigError(
            "data.tokenizer",
            sparse.data.tokenizer,
            f"the dense run has {dense.data.tokenizer}",
            "use that",
        )
    _check_experts(dense, sparse, init.split)
    _check_weights(sparse.moe)
    _check_split(sparse.moe, init.split)


def _check_experts(dense: Config, sparse: Config, split: int) -> None:
    """Raise ConfigError unless the dense feed-forward can be copied into every expert."""
    experts, dense_kind = sparse.moe.experts, dense.moe.experts.kind
    hidden_dim = dense_hidden_dim(dense.model, dense.moe)
    if experts.kind != dense_kind:
        allowed = f"the dense run has {dense_kind}"
        raise ConfigError("moe.experts.kind", experts.kind, allowed, "use that")
    for name in ("shared", "shapes", "zero", "copy", "constant"):
        if getattr(experts, name):
            raise ConfigError(
                f"moe.experts.{name}",
                getattr(experts, name),
                "is no copy of the dense feed-forward, so the outputs would not be equal",
                f"leave moe.experts.{name} out",
            )
    if hidden_dim % split:
        allowed = f"must divide {hidden_dim}, the width of the dense feed-forwards"
        raise ConfigError("--split", split, allowed, "use 1, 2 or 4")
    width, of = hidden_dim // split, f"1/{split} of " if split > 1 else ""
    if sparse.moe.expert_dim != width:
        allowed = f"must be {width}, {of}the width of the dense feed-forwards that are copied"
        raise ConfigError("moe.expert_dim", sparse.moe.expert_dim, allowed, f"use {width}")
    dense_dim = dense_hidden_dim(sparse.model, sparse.moe)
    if len(moe_blocks(sparse)) < sparse.model.layers and dense_dim != hidden_dim:
        allowed = f"must be {hidden_dim} in the blocks that stay dense, as in the dense run"
        raise ConfigError("model.dense_dim", dense_dim, allowed, f"use {hidden_dim}")


def _check_weights(moe: MoEConfig) -> None:
    """Raise ConfigError unless the combine weights of every token sum to 1."""
    router, spec = moe.router, router_spec(moe.router.kind)
    if spec.can_choose_none:
        allowed = "gives some tokens no expert, so the outputs would not be equal"
        raise ConfigError("moe.router.kind", router.kind, allowed, "use top_k")
    if router.scale != 1:
        allowed = "multiplies the output of the dense model"
        raise ConfigError("moe.router.scale", router.scale, allowed, "use 1")
    softmax_of_chosen = router.weights_from == "chosen" and router.score == "softmax"
    if spec.weights_sum_to_scale or router.renormalize or softmax_of_chosen:
        return
    allowed = "makes weights that sum to less than 1, so the outputs would not be equal"
    fix = "set it to true" if moe.top_k > 1 else "set it to true, with moe.top_k=2 or more"
    raise ConfigError("moe.router.renormalize", False, allowed, fix)


def _check_split(moe: MoEConfig, split: int) -> None:
    """Raise ConfigError unless every token takes whole feed-forwards, with equal weights."""
    if split == 1:
        return
    spec = router_spec(moe.router.kind)
    others = spec.variable_k or spec.has_noise or "groups" in spec.reads
    if others or not spec.replayable:
        allowed = f"with --split {split} a token must take all parts of a feed-forward"
        raise ConfigError("moe.router.kind", label(moe.router.kind), allowed, "use top_k")
    for field, value in (("moe.top_k", moe.top_k), ("moe.num_experts", moe.num_experts)):
        if value % split:
            allowed = f"must be a multiple of --split {split}, the parts of a feed-forward"
            raise ConfigError(field, value, allowed, f"use {-(-value // split) * split}")
    if moe.router.jitter:
        allowed = f"would choose parts of different feed-forwards with --split {split}"
        raise ConfigError("moe.router.jitter", moe.router.jitter, allowed, "use 0")
