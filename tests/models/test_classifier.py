"""The classifier against its formulas, one sample at a time, in plain operations on its weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dmoe.config.schema import BalanceConfig, ExpertsConfig, ModelConfig, MoEConfig, RouterConfig
from dmoe.models.base import IGNORE_INDEX
from dmoe.models.classifier import Classifier
from dmoe.models.fusion import drop_streams, present_streams
from dmoe.moe.routing import TokenContext
from tests.models.classifier_cases import (
    ALONE,
    BUDGET,
    CASES,
    FIXED,
    GATED,
    MISSING,
    SOFT,
    SPARSE,
    THREE,
    TWO,
    budget_reference,
    build_classifier,
    experts_in_budget,
    random_samples,
)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_formula(case: str) -> None:
    config, moe, widths, classes, missing, formula = CASES[case]
    x_BW, class_B1 = (
        random_samples(widths, missing=missing),
        torch.tensor([[0], [2], [1], [1], [0]]),
    )
    results = []
    for fast in (True, False):
        model = build_classifier(config, moe, widths, classes)
        if fast:
            out = model(x_BW, class_B1, return_logits=True)
            assert out.logits.shape == (5, 1, classes)
            logits, loss = out.logits.squeeze(1), out.loss_sum
        else:
            logits = torch.stack([formula(model, x_W) for x_W in x_BW])
            loss = sum(-logits[b].log_softmax(0)[c] for b, (c,) in enumerate(class_B1.tolist()))
        loss.backward()
        grads = {
            name: torch.zeros_like(p) if p.grad is None else p.grad
            for name, p in model.named_parameters()
        }
        results.append({"logits": logits.detach(), "loss": loss.detach()} | grads)
    for name, expected in results[1].items():
        scale = max(1.0, float(expected.abs().max()))
        assert float((results[0][name] - expected).abs().max()) < 1e-12 * scale, name
    assert all(grad.any() for name, grad in results[0].items() if "experts" not in name), (
        "a weight that nothing reads"
    )


def test_a_call_can_give_another_budget_and_accounts_for_it() -> None:
    model, x_BW = build_classifier(ALONE, BUDGET, [64, 36], 10), random_samples([64, 36], 40)
    seen = set()
    for budget in (0.05, 0.3, 0.5, 1.0):
        out = model.head(x_BW.unsqueeze(1), compute_budget=budget)
        for b, x_W in enumerate(x_BW):
            experts = experts_in_budget(model, x_W, budget)
            spent = sum([1000, 5500, 8768][e] for e in experts) / 15268
            torch.testing.assert_close(
                out.y[b, 0], budget_reference(model, x_W, budget), rtol=0, atol=1e-11
            )
            assert float(out.compute_usage.cost_T[b]) == pytest.approx(spent)
            assert out.compute_usage.of_token(b).count("taken") == len(experts)
            seen.add(tuple(experts))
        usage_E = [
            sum(e in experts_in_budget(model, x_W, budget) for x_W in x_BW) / 40 for e in range(3)
        ]
        assert out.compute_usage.usage_E.tolist() == pytest.approx(usage_E)
    assert {(), (0,), (1,)} <= seen, "the budgets made no difference"


@pytest.mark.parametrize("every", [0, 1, 2])
def test_blocks_are_residual_and_end_in_a_norm(every: int) -> None:
    config = ModelConfig(dim=6, layers=2, moe_every=every, head="experts")
    model, x_BW = (
        build_classifier(config, replace(SPARSE, balance=BalanceConfig(z=0.0)), TWO),
        random_samples(TWO),
    )
    x_BD = model.fusion.projection(x_BW)
    for block in model.blocks:
        inner = block.feed_forward(block.feed_forward_norm(x_BD))
        x_BD = x_BD + (inner if isinstance(inner, Tensor) else inner.y)
    out = model(x_BW)
    torch.testing.assert_close(
        out.logits.squeeze(1), model.head(model.norm(x_BD)).y, rtol=0, atol=1e-12
    )
    assert [layer.layer for layer in model.moe_layers()] == list(range(len(out.stats)))
    assert len(out.stats) == {0: 1, 1: 3, 2: 2}[every]


def test_a_missing_stream_is_zeros_when_concatenated() -> None:
    model, x_BW = (
        build_classifier(ModelConfig(dim=6, layers=1), SPARSE, TWO),
        random_samples(TWO, missing=True),
    )
    assert torch.equal(model(x_BW).logits, model(x_BW.nan_to_num(0.0)).logits)
    x_BW[1, 2] = 5.0  # one value of a stream whose others are NaN: it is missing as a whole
    assert torch.equal(model(x_BW).logits[1], model(random_samples(TWO, missing=True)).logits[1])


def test_a_missing_stream_is_neither_dispatched_nor_counted() -> None:
    model = build_classifier(GATED, replace(FIXED, num_experts=3), THREE)
    counts = model(random_samples(THREE, missing=True)).stats[0].choice_E.tolist()
    assert counts == [5 - sum(s in lost for lost in MISSING[3]) for s in range(3)]


@pytest.mark.parametrize(
    ("config", "moe"), [(GATED, FIXED), (ALONE, SOFT), (ModelConfig(dim=6, layers=1), SPARSE)]
)
def test_padding_counts_nowhere_and_changes_nothing(config: ModelConfig, moe: MoEConfig) -> None:
    model, x_BW = build_classifier(config, moe, TWO), random_samples(TWO)
    valid = torch.tensor([True, True, True, False, False])
    whole = model(
        x_BW,
        torch.tensor([[0], [1], [2], [-100], [-100]]),
        TokenContext(valid_T=valid),
        return_logits=True,
    )
    part = model(x_BW[:3], torch.tensor([[0], [1], [2]]), return_logits=True)
    torch.testing.assert_close(whole.loss_sum, part.loss_sum)
    torch.testing.assert_close(whole.logits[:3], part.logits, rtol=0, atol=1e-12)
    assert torch.equal(whole.stats[0].choice_E, part.stats[0].choice_E)
    assert whole.logits.isfinite().all()


@pytest.mark.parametrize("widths", [TWO, THREE])
def test_stream_dropout_removes_one_stream_of_a_fraction_of_the_samples(widths: list[int]) -> None:
    streams = len(widths)
    present_BS = torch.ones(2000, streams, dtype=torch.bool)
    kept_BS = drop_streams(present_BS, 0.3, TokenContext(noise_key=(0, 7)))
    lost_B = (~kept_BS).sum(1)
    assert lost_B.max() == 1
    assert float(lost_B.double().mean()) == pytest.approx(0.3, abs=0.04)
    for share in (~kept_BS).double().mean(0).tolist():
        assert share == pytest.approx(0.3 / streams, abs=0.03)
    late = drop_streams(present_BS[1500:], 0.3, TokenContext(noise_key=(0, 7), first_sequence=1500))
    assert torch.equal(late, kept_BS[1500:]), "what is dropped depends on how the batch is spread"
    for key in ((1, 7), (0, 8)):
        assert not torch.equal(drop_streams(present_BS, 0.3, TokenContext(noise_key=key)), kept_BS)
    present_BS[:, 0] = False
    left_BS = drop_streams(present_BS, 1.0, TokenContext(noise_key=(0, 7)))
    assert left_BS.sum(1).unique().tolist() == [max(1, streams - 2)], (
        "the last stream went too, or none"
    )


def test_stream_dropout_is_only_for_training() -> None:
    model, x_BW = (
        build_classifier(replace(GATED, stream_dropout=1.0), FIXED, TWO),
        random_samples(TWO),
    )
    assert model(x_BW, context=TokenContext(noise_key=(0, 0))).stats[0].choice_E.sum() == 5
    with pytest.raises(ValueError, match="noise_key"):
        model(x_BW)
    assert model.eval()(x_BW).stats[0].choice_E.sum() == 10


def test_recompute_and_virtual_ranks_change_no_number() -> None:
    config = ModelConfig(dim=6, layers=2, head="experts")
    plain, other = (
        build_classifier(config, SPARSE, TWO),
        build_classifier(config, SPARSE, TWO, virtual_ranks=2, recompute=True),
    )
    x_BW, class_B1 = random_samples(TWO, 6), torch.zeros(6, 1, dtype=torch.int64)
    for model in (plain, other):
        model(x_BW, class_B1).loss_sum.backward()
    for one, again in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, again.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_meta_then_empty_then_initialize_equals_direct_construction(case: str) -> None:
    config, moe, widths, classes, _, _ = CASES[case]
    direct = Classifier(config, moe, widths, classes)
    with torch.device("meta"):
        later = Classifier(config, moe, widths, classes)
    assert later.num_parameters() == direct.num_parameters()
    later.to_empty(device="cpu")
    for parameter in later.parameters():  # whatever the memory held
        parameter.data.fill_(torch.nan)
    later.initialize(0)
    for (name, one), other in zip(direct.named_parameters(), later.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_no_two_weights_are_the_same_draw() -> None:
    for config, moe in (
        (GATED, replace(FIXED, num_experts=3)),
        (ModelConfig(dim=6, layers=2, head="experts"), SPARSE),
    ):
        drawn = [
            p
            for name, p in Classifier(config, moe, THREE, 3).named_parameters()
            if p.dim() > 1 and "gate" not in name
        ]
        firsts = [round(p.flatten()[0].item(), 9) for p in drawn]
        assert len(set(firsts)) == len(firsts)


def test_parameters_and_flops_of_a_sample() -> None:
    encoders, gate = 3 * (6 * 5 + 5 * 6), 18 * 12
    model = Classifier(GATED, replace(FIXED, num_experts=3), THREE, 3)
    count = model.num_parameters()
    matrices = sum(THREE) * 6 + encoders + gate + 6 * 3
    assert count.total == count.active == matrices + 3 * 6 + 12 + 3
    assert model.flops_per_token(1) == 2 * matrices
    sparse = Classifier(ALONE, replace(SOFT, top_k=2, router=RouterConfig()), TWO, 3)
    assert sparse.num_parameters().total == 4 * 7 + 4 * (7 * 5 + 5 * 3)
    assert sparse.num_parameters().active == 4 * 7 + 2 * (7 * 5 + 5 * 3)


def test_present_streams() -> None:
    assert present_streams(random_samples(THREE, missing=True), THREE).tolist() == [
        [s not in lost for s in range(3)] for lost in MISSING[3]
    ]


def test_bfloat16_autocast_is_near_float32() -> None:
    for config, moe in ((GATED, FIXED), (ModelConfig(dim=6, layers=1), SPARSE)):
        model, x_BW, class_B1 = (
            build_classifier(config, moe, TWO).float(),
            random_samples(TWO).float(),
            torch.zeros(5, 1, dtype=torch.int64),
        )
        exact = model(x_BW, class_B1).loss_sum
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(x_BW, class_B1).loss_sum
        assert rough.dtype == torch.float32
        torch.testing.assert_close(rough, exact, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 65504.0])
@pytest.mark.parametrize("fusion", ["concat", "gated"])
def test_padding_reaches_no_sample(fusion: str, value: float) -> None:
    """An evaluation fills its last batch; a sample of padding, or a missing stream, may hold NaN.

    The mean over real samples, their logits and all gradients are those of padding that holds 0.5.
    """
    kind = "fixed" if fusion == "gated" else "top_k"
    router = RouterConfig(kind=kind, renormalize=False)  # type: ignore[arg-type]
    moe = MoEConfig(2, 1, 4, router=router, experts=ExpertsConfig(shared=1))
    config = ModelConfig(dim=6, layers=1, fusion=fusion, init_std=0.3)  # type: ignore[arg-type]
    valid_B = torch.tensor([True, False, True, True])
    target_B1 = torch.tensor([[0], [IGNORE_INDEX], [2], [1]])
    found = []
    for padding in (0.5, value):
        model = Classifier(config, moe, [3, 2], 3).double()
        x_BW = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x_BW[0, :3] = float("nan")
        x_BW[1] = padding
        out = model(x_BW, target_B1, TokenContext(valid_T=valid_B), return_logits=True)
        assert out.logits is not None
        (out.loss_sum + sum(loss for layer in out.aux for loss in layer.values())).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append(grads | {"loss": out.loss_sum, "logits": out.logits[valid_B]})
    clean, poisoned = found
    assert clean.keys() == poisoned.keys()
    for name, expected in clean.items():
        assert bool(expected.isfinite().all()), name
        assert torch.equal(poisoned[name], expected), name
