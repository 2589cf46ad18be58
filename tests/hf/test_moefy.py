"""`dmoe.moefy` in one process: losses, counts, padding, recomputation, biases, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import set_checkpoint_early_stop

import dmoe
from dmoe.config.errors import ConfigError
from dmoe.config.schema import BalanceConfig, CapacityConfig
from dmoe.hf import auxiliary_loss, forward_of, moefied_layers
from tests.hf.families import tiny

BALANCE = BalanceConfig(switch=0.1, z=0.01)


def ids(sequences: int = 2, length: int = 12) -> Tensor:
    return torch.randint(3, 97, (sequences, length), generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_nothing_of_the_model_is_renamed() -> None:
    plain, moefied = tiny("mixtral"), dmoe.moefy(tiny("mixtral"))
    assert list(plain.state_dict()) == list(moefied.state_dict())
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in moefied.named_modules()]


def test_the_loss_contains_the_auxiliary_losses() -> None:
    """Those of the formula, from the router's logits: E sum f P, and the mean of logsumexp^2."""
    model = dmoe.moefy(tiny("mixtral"), balance=BALANCE)
    logits: list[Tensor] = []
    for layer in moefied_layers(model):
        layer.router.register_forward_hook(lambda m, i, out: logits.append(out[0]))
    output = model(input_ids=ids(), labels=ids(), use_cache=False)
    expected = 0.0
    for logit_TE in logits:
        logit_TE = logit_TE.detach()
        score_TE = torch.softmax(logit_TE, -1)
        chosen_TE = torch.zeros_like(score_TE)
        for t in range(len(score_TE)):
            chosen_TE[t, sorted(range(8), key=lambda e: -float(score_TE[t, e]))[:2]] = 1
        share_E = chosen_TE.sum(0) / chosen_TE.sum()
        expected += 0.1 * float(8 * (share_E * score_TE.mean(0)).sum())
        expected += 0.01 * float((logit_TE.logsumexp(-1) ** 2).mean())
    assert float(auxiliary_loss(model).detach()) == pytest.approx(expected, rel=1e-9)
    model.eval()
    plain = model(input_ids=ids(), labels=ids(), use_cache=False)
    assert float(output.loss - plain.loss) == pytest.approx(expected, rel=1e-5)


def test_padding_is_neither_routed_nor_counted() -> None:
    """Logits of real positions are those of the sequence alone; the mask is transformers' own."""
    model = dmoe.moefy(tiny("qwen3_moe"), balance=BALANCE)
    mask = torch.ones_like(ids())
    mask[1, 7:] = 0
    padded = model(input_ids=ids(), attention_mask=mask, use_cache=False).logits
    counts = [int(layer.stats.choice_E.sum()) for layer in forward_of(model).layers]
    assert counts == [int(mask.sum()) * 2] * 2
    alone = model(input_ids=ids()[1:, :7], use_cache=False).logits
    torch.testing.assert_close(padded[1:, :7], alone, atol=1e-6, rtol=0)


def test_capacity_is_that_of_training_and_of_evaluation() -> None:
    model = dmoe.moefy(tiny("mixtral"), CapacityConfig(factor=0.5))
    model(input_ids=ids(), use_cache=False)
    stats = forward_of(model).layers[0].stats
    assert int(stats.kept_E.max()) <= 3 < int(stats.choice_E.max())
    model.eval()
    model(input_ids=ids(), use_cache=False)
    stats = forward_of(model).layers[0].stats
    assert torch.equal(stats.kept_E, stats.choice_E)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_recomputation_counts_once_and_changes_no_gradient(family: str) -> None:
    model = dmoe.moefy(tiny(family), CapacityConfig(factor=1.0), BALANCE)
    model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with set_checkpoint_early_stop(False):  # else the second forward may stop before its end
        model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    assert len(forward_of(model).layers) == 2
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


def test_reentrant_recomputation_is_refused() -> None:
    """It would lose the gradient of the auxiliary losses in silence."""
    model = dmoe.moefy(tiny("mixtral"), balance=BALANCE)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ConfigError, match="use_reentrant=True: recomputes re-entrantly"):
        model(input_ids=ids(), labels=ids(), use_cache=False)


@pytest.mark.parametrize(
    ("family", "bias"),
    [
        ("deepseek_v3", "mlp.gate.e_score_correction_bias"),
        ("minimax_m2", "mlp.e_score_correction_bias"),
        ("ernie4_5_moe", "mlp.gate.moe_statics.e_score_correction_bias"),
        ("lfm2_moe", "feed_forward.expert_bias"),
    ],
)
def test_the_bias_of_the_family_is_moved(family: str, bias: str) -> None:
    """By u sign(mean - count), recentered; a buffer or a frozen parameter, wherever it is."""
    model = dmoe.moefy(tiny(family), balance=BalanceConfig(switch=0, z=0, bias=0.5))
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    name = next(n for n in named if n.endswith(bias))
    before = named[name].clone().flatten()
    model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
    layer = moefied_layers(model)[0]
    counts = forward_of(model).layers[0].stats.choice_E.tolist()
    signs = torch.tensor([float((sum(counts) > 8 * c) - (sum(counts) < 8 * c)) for c in counts])
    for each in moefied_layers(model):
        each.update_bias()
    moved = before + 0.5 * signs.to(before)
    torch.testing.assert_close(layer.balance_bias, moved - moved.mean())
    torch.testing.assert_close(named[name].flatten(), moved - moved.mean())


def test_a_copy_records_for_itself() -> None:
    model = dmoe.moefy(tiny("mixtral"))
    other = copy.deepcopy(model)
    output = other(input_ids=ids(), use_cache=False).logits
    assert len(forward_of(other).layers) == 2
    assert not forward_of(model).layers
    torch.testing.assert_close(output, model(input_ids=ids(), use_cache=False).logits)


def test_a_failed_forward_leaves_nothing_behind() -> None:
    model: Any = dmoe.moefy(tiny("mixtral"))
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), 1_000), use_cache=False)
    model(input_ids=ids(), use_cache=False)
    assert len(forward_of(model).layers) == 2


def test_pooled_slots_are_the_same_packed_and_padded() -> None:
    """With biases, which make a row of zeros an output that is not zero."""
    results = []
    for exchange in ("packed", "padded"):
        limits = CapacityConfig(factor=0.75, pool=4)
        model: Any = dmoe.moefy(tiny("gpt_oss"), limits, BALANCE, exchange=exchange)
        model(input_ids=ids(), labels=ids(), use_cache=False).loss.backward()
        records = forward_of(model).layers
        results.append((gradients(model), [record.plan.keep_TK for record in records]))
        assert all(int(r.stats.kept_E.sum()) < int(r.stats.choice_E.sum()) for r in records)
    (gradients_one, kept_one), (gradients_two, kept_two) = results
    assert all(torch.equal(a, b) for a, b in zip(kept_one, kept_two, strict=True))
    torch.testing.assert_close(gradients_one, gradients_two, rtol=1e-12, atol=1e-12)


REFUSED = {
    "pool": (
        lambda: tiny("mixtral"),
        {"capacity": CapacityConfig(factor=1.0, pool=3)},
        r"must divide moe\.num_experts=8",
    ),
    "a name": (lambda: "mistralai/Mixtral-8x7B", {}, "must be a model of transformers"),
    "virtual ranks": (lambda: tiny("mixtral"), {"virtual_ranks": 0}, "must be 1 or more"),
    "no mixture": (lambda: nn.Linear(2, 2), {}, "has no MoE block"),
    "twice": (lambda: dmoe.moefy(tiny("mixtral")), {}, "is moefied already"),
    "no bias": (
        lambda: tiny("mixtral"),
        {"balance": BalanceConfig(bias=0.1)},
        "MixtralTopKRouter has none",
    ),
    "padded": (lambda: tiny("mixtral"), {"exchange": "padded"}, "moe.capacity.factor"),
    "next choice": (
        lambda: tiny("mixtral"),
        {"capacity": CapacityConfig(factor=1.0, overflow="next_choice")},
        "ranks its next choices",
    ),
    "renormalize": (
        lambda: tiny("mixtral"),
        {"capacity": CapacityConfig(factor=1.0, renormalize=True)},
        "does not scale to a fixed sum",
    ),
    "load": (lambda: tiny("mixtral"), {"balance": BalanceConfig(load=0.1)}, "noisy router"),
    "type": (lambda: tiny("mixtral"), {"capacity": 1.25}, "capacity"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused(name: str) -> None:
    make, arguments, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        dmoe.moefy(make(), **arguments)


def test_a_router_that_is_not_known_is_refused_by_name() -> None:
    model = tiny("mixtral")

    class OtherRouter(nn.Module):
        pass

    model.model.layers[1].mlp.gate = OtherRouter()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=r"model.layers.1.mlp \(OtherRouter\): has no router"):
        dmoe.moefy(model)
    assert [type(module) for module in model.modules()] == kinds, "half of it was changed"


def test_the_scores_are_those_of_the_weights() -> None:
    """The chosen weights are proportional to the scores that dmoe takes for the losses."""
    for family in ("mixtral", "gpt_oss", "deepseek_v3", "minimax_m2", "ernie4_5_moe"):
        model = dmoe.moefy(tiny(family))
        model(input_ids=ids(), use_cache=False)
        for layer in forward_of(model).layers:
            routing = layer.routing
            ratio_TK = routing.weight_TK / routing.score_TE.gather(1, routing.expert_TK)
            torch.testing.assert_close(
                ratio_TK, ratio_TK[:, :1].expand_as(ratio_TK), rtol=1e-5, atol=0
            )
