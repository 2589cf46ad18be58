"""Upcycling: equal outputs at step 0, at any EP size, and experts that then differ."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from dmoe import checkpoint
from dmoe.config.errors import ConfigError
from dmoe.config.schema import Config
from dmoe.conversion.upcycle import check_upcycle, copy_weights, upcycle
from dmoe.distributed import init as worlds
from dmoe.distributed.expert_parallel import expert_locations, expert_parameters
from dmoe.distributed.full_tensors import gather_full
from dmoe.models.base import Model
from dmoe.moe.routing import TokenContext
from dmoe.train import checkpointer
from dmoe.train import engine as engines
from dmoe.train.evaluation import evaluate
from dmoe.train.step import train_step, training_batches
from dmoe.train.tasks import task_of
from tests.ranks import run_ranks
from tests.tiny import VOCAB, tiny
from tests.train.dense_run import DENSE, SPARSE, dense_run, weights

pytestmark = pytest.mark.ranks

ROUTERS = {
    "top_k": [],
    "softmax over the chosen": [
        "moe.router.weights_from=chosen",
        "moe.router.renormalize=false",
        "moe.top_k=3",
    ],
    "sigmoid": ["moe.router.score=sigmoid"],
    "noisy": ["moe.router.kind=noisy"],
    "group_limited": [
        "moe.router.kind=group_limited",
        "moe.router.groups=4",
        "moe.router.topk_groups=2",
    ],
    "adaptive": ["moe.router.kind=adaptive", "moe.top_k=4", "moe.router.k_min=2"],
    "soft": ["moe.router.kind=soft", "moe.top_k=8"],
    "fixed": ["moe.router.kind=fixed"],
    "hash": ["moe.router.kind=hash", "moe.router.renormalize=false", "moe.top_k=1"],
    "every other block": ["model.moe_every=2"],
    "not gated": ["moe.experts.kind=gelu"],
}

MODULES = ["modular.bank=adapter", "modular.modules=2"]


def logits(model: Model) -> torch.Tensor:
    token_BS = torch.arange(3 * 16).view(3, 16) * 37 % VOCAB
    found = model.eval()(
        token_BS, None, TokenContext(label_T=torch.zeros(48, dtype=torch.int64))
    ).logits
    assert found is not None
    return found.detach()


@pytest.mark.parametrize("router", ROUTERS)
def test_outputs_equal_the_dense_model(router: str) -> None:
    kind = [override for override in ROUTERS[router] if "experts.kind" in override]
    config = tiny(*SPARSE, *ROUTERS[router])
    check_upcycle(tiny(*DENSE, *kind), config)
    dense, sparse = weights(tiny(*DENSE, *kind)), task_of(config).build_model()
    assert (logits(dense) - logits(sparse)).abs().amax() > 0.1, "equal before anything is copied"
    assert len(copy_weights(dense, sparse)) == (1 if router == "every other block" else 2)
    for near in (1e-6, 1e-12):
        before, after = logits(dense), logits(sparse)
        assert before.abs().amax() > 1, "numbers that a wrong weight would move"
        assert (before - after).abs().amax() <= near * before.abs().amax()
        dense.double(), sparse.double()


def test_no_router_gradient_in_the_first_step() -> None:
    """All experts agree and the weights sum to 1, so the loss does not depend on the router.

    The experts then differ by the tokens that they are trained on.
    """
    sparse = task_of(tiny(*SPARSE)).build_model().double()
    copy_weights(weights(tiny(*DENSE)).double(), sparse)
    token_BS = torch.arange(3 * 16).view(3, 16) * 37 % VOCAB
    loss = sparse(token_BS, token_BS).loss_sum
    assert loss is not None
    loss.backward()
    for layer in sparse.moe_layers():
        router, experts = layer.router.weight.grad, layer.experts.w_in.grad
        assert router.abs().amax() < 1e-12 * experts.abs().amax()
        assert all(not torch.equal(experts[0], experts[e]) for e in range(1, 8))


class ResumedResult(NamedTuple):
    loss: float
    all_equal: bool
    all_different: bool
    """Experts of the first MoE layer: equal when loaded, different after three steps."""


def resumed(rank: int, world: int, config: Config, path: str) -> ResumedResult:
    engine = engines.build_engine(config, worlds.init_distributed("cpu"), VOCAB)
    extra = checkpointer.load_training_state(engine, Path(path))
    assert extra["step"] == 0
    data = engine.task.open_data()
    found = evaluate(engine, data)
    assert found is not None
    before = alike(engine)
    for step in range(3):
        train_step(engine, training_batches(data.train, engine, step), 0.01)
    return ResumedResult(found.loss, before == {0}, len(alike(engine)) == 8)


def alike(engine: engines.Engine) -> set[int]:
    """Return for each expert of the first MoE layer the lowest one that is equal to it."""
    model = engine.model
    whole = gather_full(
        dict(model.named_parameters()),
        set(expert_parameters(model)),
        engine.mesh,
        expert_locations(model),
    )
    stacked = next(value for name, value in whole.items() if name.endswith("experts.w_in"))
    return {
        next(f for f in range(len(stacked)) if torch.equal(stacked[f], stacked[e]))
        for e in range(len(stacked))
    }


def dense_loss(rank: int, world: int, config: Config, path: str) -> float:
    engine = engines.build_engine(config, worlds.init_distributed("cpu"), VOCAB)
    known = {f"model.{name}": value.detach() for name, value in engine.model.named_parameters()}
    checkpoint.load(Path(path), known, prefix="model.")
    found = evaluate(engine, engine.task.open_data())
    assert found is not None
    return found.loss


def test_two_ranks_resume_with_the_loss_of_the_dense_run(tmp_path: Path) -> None:
    run = dense_run(tmp_path / "dense")
    config = tiny(*SPARSE, f"train.run_dir={tmp_path / 'sparse'}", "parallel.ep=2")
    made = upcycle(run, config, "")
    assert made.difference < 1e-4
    assert (made.step, len(made.layers), made.experts) == (5, 2, 8)
    assert made.parameters > made.dense_parameters + 7 * 2 * 3 * 32 * 24
    there = str(checkpoint.find_latest(tmp_path / "sparse" / "checkpoints"))
    known = run_ranks(1, dense_loss, tiny(*DENSE), str(run.checkpoints / "step-00000005"))[0]
    for seen in run_ranks(2, resumed, config, there):
        assert seen.loss == pytest.approx(known, rel=1e-6)
        assert seen.all_equal
        assert seen.all_different
    with pytest.raises(ConfigError, match=r"train\.run_dir=.*holds a run with checkpoints"):
        upcycle(run, config, "")


@pytest.mark.parametrize(
    ("dense", "sparse", "words"),
    [
        ([], ["model.moe_every=0"], "leaves no block to upcycle"),
        (["model.moe_every=2"], [], "RUN=model.moe_every=2: is not dense"),
        ([], ["model.layers=3"], "model.layers=3: the dense run has 2"),
        # Once modules were dropped silently, and training could not load the checkpoint.
        (MODULES, [], "modular.bank=adapter: adds modules"),
        ([], MODULES, "modular.bank=adapter: adds modules"),
        ([], ["model.tie_embeddings=false"], "model.tie_embeddings=False: the dense run has True"),
        ([], ["moe.expert_dim=32"], "moe.expert_dim=32: must be 24"),
        ([], ["moe.experts.kind=gelu"], "moe.experts.kind=gelu: the dense run has swiglu"),
        ([], ["moe.experts.shared=1"], "moe.experts.shared=1: is no copy"),
        ([], ["moe.experts.zero=1"], "moe.experts.zero=1: is no copy"),
        ([], ["model.moe_every=2", "model.dense_dim=null"], "model.dense_dim=48: must be 24"),
        (
            [],
            ["moe.router.renormalize=false"],
            "moe.router.renormalize=False: makes weights that sum to less than 1",
        ),
        ([], ["moe.top_k=1", "moe.router.renormalize=false"], "with moe.top_k=2 or more"),
        ([], ["moe.router.scale=2.5"], "moe.router.scale=2.5: multiplies"),
        (
            [],
            ["moe.router.kind=expert_choice", "moe.router.allow_future_leak=true"],
            "gives some tokens no expert",
        ),
    ],
)
def test_unequal_models_are_refused(
    dense: list[str], sparse: list[str], words: str, tmp_path: Path
) -> None:
    run = dense_run(tmp_path / "dense", *dense)
    with pytest.raises(ConfigError) as refusal:
        upcycle(run, tiny(*SPARSE, f"train.run_dir={tmp_path / 'sparse'}", *sparse), "")
    assert words in str(refusal.value)
    assert not (tmp_path / "sparse").exists()
