"""Experts as parts, with a share re-initialised, with noise; from published dense models too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.schema import Config
from dmoe.conversion.expert_copies import ExpertInit, copy_weights
from dmoe.conversion.upcycle import upcycle, upcycle_published
from dmoe.conversion.upcycle_rules import check_upcycle
from dmoe.models.base import Model
from dmoe.moe.experts import grouped_mlp
from dmoe.runs.directory import RunDir
from dmoe.train.restore import restore_model
from dmoe.train.tasks import task_of
from tests.conversion.test_upcycle import logits
from tests.tiny import tiny
from tests.train.dense_run import DENSE, SPARSE, dense_run, weights

PARTS = {
    "2 parts": (2, ("moe.expert_dim=12", "moe.top_k=2")),
    "2 parts, 2 replicas": (2, ("moe.expert_dim=12", "moe.top_k=4", "moe.num_experts=12")),
    "4 parts, sigmoid": (4, ("moe.expert_dim=6", "moe.top_k=4", "moe.router.score=sigmoid")),
    "3 parts, not gated": (
        3,
        ("moe.expert_dim=8", "moe.top_k=6", "moe.num_experts=12", "moe.experts.kind=gelu"),
    ),
    "the softmax of the chosen": (
        2,
        ("moe.expert_dim=12", "moe.top_k=4", "moe.router.weights_from=chosen"),
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_keep_the_function(case: str) -> None:
    split, overrides = PARTS[case]
    kind = [override for override in overrides if "experts.kind" in override]
    dense_config, config = tiny(*DENSE, *kind), tiny(*SPARSE, *overrides)
    init = ExpertInit(split)
    check_upcycle(dense_config, config, init)
    dense, sparse = weights(dense_config), task_of(config).build_model()
    for near in (1e-5, 1e-12):
        copy_weights(dense, sparse, init)
        before, after = logits(dense), logits(sparse)
        assert before.abs().amax() > 1
        assert (before - after).abs().amax() <= near * before.abs().amax()
        dense.double(), sparse.double()
    first = sparse.moe_layers()[0]
    assert torch.equal(first.experts.w_in[0], first.experts.w_in[split])
    assert not torch.equal(first.experts.w_in[0], first.experts.w_in[1])
    chosen = first(torch.randn(50, 32, dtype=torch.float64)).routing.expert_TK
    replicas = chosen // split
    assert len(replicas.unique()) > 1, "tokens differ in the replica that they take"
    assert all(len(set(row.tolist())) == row.numel() // split for row in replicas)


def changed(init: ExpertInit, seed: int = 0) -> tuple[Model, Model]:
    dense, sparse = weights(tiny(*DENSE)), task_of(tiny(*SPARSE)).build_model()
    copy_weights(dense, sparse, init, seed)
    return dense, sparse


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_share_of_the_units_of_each_expert_is_drawn_anew(share: float) -> None:
    """The units of gate, up and down together, other ones in each expert, with the old spread."""
    dense, sparse = changed(ExpertInit(drop=share))
    layer = sparse.moe_layers()[1]
    width, count = 24, round(24 * share)
    source = dense.get_submodule("blocks.1.feed_forward")
    w_in, w_out = source.w_in.weight.t(), source.w_out.weight.t()
    units_of_experts = set()
    for e in range(8):
        new = (layer.experts.w_out[e] != w_out).all(1)
        same = (layer.experts.w_out[e] == w_out).all(1)
        assert (int(new.sum()), int(same.sum())) == (count, width - count)
        for half in (0, 1):
            columns = slice(half * width, half * width + width)
            moved = (layer.experts.w_in[e][:, columns] != w_in[:, columns]).all(0)
            assert torch.equal(moved, new)
        spread = layer.experts.w_out[e][new].std() / w_out[new].std()
        assert 0.7 < spread < 1.4
        units_of_experts.add(tuple(new.nonzero().flatten().tolist()))
    assert len(units_of_experts) == (8 if share < 1 else 1)
    again, other = changed(ExpertInit(drop=share))[1], changed(ExpertInit(drop=share), 1)[1]
    assert torch.equal(again.moe_layers()[1].experts.w_in, layer.experts.w_in)
    assert not torch.equal(other.moe_layers()[1].experts.w_in, layer.experts.w_in)


def test_noise_is_a_share_of_the_spread_of_each_matrix() -> None:
    dense, sparse = changed(ExpertInit(noise=0.1))
    layer, source = sparse.moe_layers()[0], dense.get_submodule("blocks.0.feed_forward")
    for e in range(8):
        for found, was in (
            (layer.experts.w_in[e], source.w_in.weight.t()),
            (layer.experts.w_out[e], source.w_out.weight.t()),
        ):
            assert 0.08 < float(((found - was).std() / was.std()).detach()) < 0.12


def test_how_much_the_function_changes_is_said(tmp_path: Path) -> None:
    run = dense_run(tmp_path / "dense")
    results = {}
    for name, init in {
        "copies": ExpertInit(),
        "noise": ExpertInit(noise=0.02),
        "drop": ExpertInit(drop=0.5),
    }.items():
        config = tiny(*SPARSE, f"train.run_dir={tmp_path / name}")
        results[name] = upcycle(run, config, "", init=init)
    differences = [results[name].difference for name in ("copies", "noise", "drop")]
    assert differences[0] < 1e-4 < differences[1] < differences[2]
    assert results["copies"].loss == pytest.approx(results["copies"].dense_loss, rel=1e-5)
    assert results["drop"].loss != pytest.approx(results["drop"].dense_loss, rel=1e-3)


def test_each_expert_is_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The constructor draws nothing: of 637 M weights of experts each draw takes seconds."""
    run, drawn = dense_run(tmp_path / "dense"), 0

    def count(tensor: torch.Tensor, *_: object) -> None:
        nonlocal drawn
        drawn += not tensor.is_meta

    monkeypatch.setattr(grouped_mlp, "normal_", count)
    result = upcycle(run, tiny(*SPARSE, f"train.run_dir={tmp_path / 'sparse'}"), "")
    assert drawn == 2 * len(result.layers) * result.experts, "two matrices per expert"


@pytest.mark.parametrize(
    ("init", "overrides", "words"),
    [
        (ExpertInit(2), "moe.expert_dim=24", "moe.expert_dim=24: must be 12, 1/2 of the width"),
        (ExpertInit(5), "", "--split=5: must divide 24"),
        (ExpertInit(2), "moe.expert_dim=12 moe.top_k=3", "moe.top_k=3: must be a multiple of"),
        (
            ExpertInit(2),
            "moe.expert_dim=12 moe.num_experts=7",
            "moe.num_experts=7: must be a multiple of",
        ),
        (ExpertInit(2), "moe.expert_dim=12 moe.router.kind=noisy", "moe.router.kind=noisy: with"),
        (ExpertInit(2), "moe.expert_dim=12 moe.router.jitter=0.1", "moe.router.jitter=0.1: would"),
    ],
)
def test_parts_that_would_not_keep_it_are_refused(
    init: ExpertInit, overrides: str, words: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_upcycle(tiny(*DENSE), tiny(*SPARSE, *overrides.split()), init)
    assert words in str(refusal.value)


@pytest.mark.parametrize("numbers", [{"split": 0}, {"drop": 1.5}, {"noise": -1.0}])
def test_numbers_that_mean_nothing_are_refused(numbers: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(numbers))}="):
        ExpertInit(**numbers)  # type: ignore[arg-type]


SHAPE = {
    "vocab_size": 256,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
}
PUBLISHED = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "smollm": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {"tie_word_embeddings": True},
    ),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 6}),
}


def given(path: Path, *overrides: str) -> Config:
    base = ("data.source=synthetic:zipf", "data.seq_len=16", "train.device=cpu")
    return load(None, [*base, "tracking.trackers=[]", f"train.run_dir={path}", *overrides])


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("split", [1, 2])
def test_a_published_dense_model_is_upcycled(name: str, split: int, tmp_path: Path) -> None:
    """Step-0 logits are those of transformers, for copies and for parts."""
    kind, model_class, more = PUBLISHED[name]
    model = model_class(kind(**SHAPE, **more)).eval()
    with torch.no_grad():
        for index, (_, p) in enumerate(model.named_parameters()):
            if p.dim() == 1:
                p.copy_(1 + 0.1 * torch.arange(len(p)) / len(p) + 0.01 * index)
    model.save_pretrained(tmp_path / "dense")
    result = upcycle_published(
        tmp_path / "dense", given(tmp_path / "new", "moe.top_k=4"), init=ExpertInit(split)
    )
    assert (result.step, len(result.layers), result.difference < 1e-4) == (None, 3, True)
    restored = restore_model(RunDir(tmp_path / "new"))
    assert restored.config.moe.expert_dim == 24 // split
    token_BS = torch.arange(48).view(3, 16) * 37 % 256
    with torch.no_grad():
        theirs = model(token_BS).logits
        ours = restored.model(token_BS).logits
    assert theirs.abs().max() > 1
    assert (theirs - ours).abs().max() < 1e-4


def test_a_published_mixture_is_refused(tmp_path: Path) -> None:
    shape = {**SHAPE, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**shape))
    model.save_pretrained(tmp_path / "mixture")
    with pytest.raises(ConfigError, match="is a mixture already"):
        upcycle_published(tmp_path / "mixture", given(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
