"""Sparse upcycling (Komatsuzaki et al. 2022): an MoE model that starts from a trained dense one.

    expert_e = the dense feed-forward, for every e;  router = new;  everything else = copied

With weights that sum to 1, `sum_k w_k f(x) = f(x)`: at step 0 the outputs of both models are equal,
whatever the router selects. So in the first step the router gets no gradient of the loss, since all
experts agree; only the load-balancing losses move it. Experts become different because each is
trained on the tokens routed to it, scaled by their weights. No noise is added to the copies.

Optimizer state and learning-rate schedule start from zero, as in the paper's default.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from dmoe.config.errors import ConfigError
from dmoe.config.load import load as load_config
from dmoe.config.router_kinds import router_spec
from dmoe.config.rules import check, moe_blocks
from dmoe.config.schema import Config, MoEConfig, ParallelConfig
from dmoe.conversion.new_run import first_extra, write_run
from dmoe.data import open_tokenizer
from dmoe.models.base import Model
from dmoe.models.layers import dense_hidden_dim
from dmoe.moe.experts import FeedForward, MLPExperts
from dmoe.moe.layer import MoE
from dmoe.moe.routing import TokenContext
from dmoe.runs.directory import RunDir
from dmoe.train.restore import RestoredModel, restore_model
from dmoe.train.tasks import DataSplits, Task, task_of

FREE_MODEL_FIELDS = ("moe_every", "dense_first", "dense_dim", "init_std")
"""Fields of `model` that may differ: which blocks are sparse, and the init of the routers."""
NUM_CHECK_SEQUENCES = 4


@dataclass(frozen=True)
class UpcycleResult:
    """Result of `upcycle`; widths and counts are those of the new model.

    The field names are the keys of `dmoe checkpoint upcycle --json`.
    """

    path: str
    """The new run directory."""
    source: str
    step: int
    """Step of the dense run."""
    layers: list[str]
    """Names of the feed-forward layers that have become MoE layers."""
    experts: int
    dense_parameters: int
    parameters: int
    difference: float
    """Largest absolute difference of any logit on a few held-out sequences: rounding, unless an
    evaluation capacity drops tokens."""


def upcycle(
    source: RunDir,
    config: Config,
    config_text: str,
    step: int | None = None,
    *,
    trust_code: bool = False,
) -> UpcycleResult:
    """Create the run of `config`, with a checkpoint of step 0 from which `dmoe train` continues.

    `dmoe train` may have any world and expert-parallel size. Cost: one process; memory of the dense
    weights and three times the sparse ones, since Adam's moments are saved as zeros.

    Args:
        source: run of a dense model.
        config: the config of the new run.
        config_text: text of its file, stored in the run directory.
        step: which checkpoint of `source`, by default the newest intact one.
        trust_code: load the code that `source` names.

    Raises:
        ConfigError: for models that do not fit, or a run directory in use.
        CheckpointError: if there is no intact checkpoint.
    """
    check(replace(config, parallel=ParallelConfig(virtual_ranks=config.parallel.virtual_ranks)), 1)
    check_upcycle(load_config(source.path / "resolved.yaml"), config)
    dense, task = restore_model(source, step, trust_code=trust_code), task_of(config)
    data, model = task.open_data(), task.build_model()
    model.initialize(config.train.seed)
    layers = copy_weights(dense.model.cpu(), model)
    difference = _max_logit_difference(dense, model, task, data)
    extra = first_extra(config, data, upcycled_from=f"{source.path} step {dense.step}")
    path = write_run(config, config_text, model, extra)
    before, after = dense.model.num_parameters().total, model.num_parameters().total
    return UpcycleResult(
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
    """Raise ConfigError unless the sparse model can start with the outputs of the dense one."""
    for config in (dense, sparse):
        if config.train.task != "language_modelling":
            raise ConfigError(
                "train.task",
                config.train.task,
                "cannot be upcycled",
                "use language_modelling in both runs",
            )
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
    for name, value in asdict(sparse.model).items():
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
    _check_experts(dense, sparse)
    _check_weights(sparse.moe)


def copy_weights(dense: Model, sparse: Model) -> list[str]:
    """Copy the dense feed-forward into every expert in its place, and all other weights.

    Routers are left as they are. Returns the names of the MoE layers. The models must fit, as
    `check_upcycle` makes sure.
    """
    moe_layers = {name: layer for name, layer in sparse.named_modules() if isinstance(layer, MoE)}
    dense_weights = dict(dense.named_parameters())
    with torch.no_grad():
        for name, layer in moe_layers.items():
            feed_forward, experts = dense.get_submodule(name), layer.experts
            assert isinstance(feed_forward, FeedForward)
            assert isinstance(experts, MLPExperts), "experts of one shape"
            # [D, H] is broadcast to [E, D, H].
            experts.w_in.copy_(feed_forward.w_in.weight.t())
            experts.w_out.copy_(feed_forward.w_out.weight.t())
        for name, parameter in sparse.named_parameters():
            if not name.startswith(tuple(f"{layer}." for layer in moe_layers)):
                parameter.copy_(dense_weights[name])
    return list(moe_layers)


def _check_experts(dense: Config, sparse: Config) -> None:
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
    if sparse.moe.expert_dim != hidden_dim:
        allowed = f"must be {hidden_dim}, the width of the dense feed-forwards that are copied"
        raise ConfigError("moe.expert_dim", sparse.moe.expert_dim, allowed, f"use {hidden_dim}")
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


@torch.no_grad()
def _max_logit_difference(
    dense: RestoredModel, sparse: Model, task: Task, data: DataSplits
) -> float:
    """Return the largest absolute difference of any logit on a few held-out sequences."""
    available = data.held_out.num_sequences
    count = NUM_CHECK_SEQUENCES if available is None else min(NUM_CHECK_SEQUENCES, available)
    samples = task.samples(data.held_out, 0, count)
    context = TokenContext(label_T=samples.label_B.repeat_interleave(samples.input.shape[1]))
    before, after = (
        model.eval()(samples.input, None, context).logits for model in (dense.model, sparse)
    )
    return float((before - after).abs().amax())
