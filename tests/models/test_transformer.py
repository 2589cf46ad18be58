"""The whole model: shapes, losses, recomputation, causality, sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from dmoe.config.schema import CapacityConfig, ExpertsConfig, ModelConfig
from dmoe.models.transformer import Transformer
from dmoe.moe.experts import FeedForward
from dmoe.moe.layer import MoE
from dmoe.moe.routing import TokenContext
from tests.models.small import MODEL, MOE, VOCAB, batch, gradients, small, total_loss


@pytest.mark.parametrize("mode", [True, "experts", "activation", "offload"])
def test_recompute_changes_no_number_and_counts_nothing_twice(mode):
    moe = replace(MOE, capacity=CapacityConfig(factor=1.0))
    token, target = batch()
    plain, again = small(moe), small(moe, recompute="none" if mode == "offload" else mode)
    assert again.recompute == {True: "block", "offload": "none"}.get(mode, mode)
    again.offload = mode == "offload"  # on a CPU it moves nothing, and must change nothing
    outs = [model(token, target) for model in (plain, again)]
    for out in outs:
        total_loss(out, target.numel()).backward()
    assert torch.equal(outs[0].loss_sum, outs[1].loss_sum)
    for one, other in zip(outs[0].stats, outs[1].stats, strict=True):
        assert torch.equal(one.as_vector(), other.as_vector())
    assert outs[1].stats[0].choice_E.sum() == 2 * token.numel()
    for name, grad in gradients(plain).items():
        torch.testing.assert_close(gradients(again)[name], grad, rtol=1e-12, atol=1e-12, msg=name)


def test_a_later_token_never_changes_an_earlier_logit():
    model = small()
    token, _ = batch()
    before = model(token).logits
    token[:, 6] = (token[:, 6] + 1) % VOCAB
    after = model(token).logits
    torch.testing.assert_close(after[:, :6], before[:, :6], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(after[:, 6:], before[:, 6:])


def test_loss_is_the_cross_entropy_of_targets_that_are_not_ignored():
    model = small()
    token, target = batch()
    target[0, :5] = -100
    out = model(token, target, return_logits=True)
    kept = target != -100
    torch.testing.assert_close(
        out.loss_sum, F.cross_entropy(out.logits[kept], target[kept], reduction="sum")
    )
    assert model(token, target).logits is None
    assert model(token).loss_sum is None
    assert out.stats[0].choice_E.sum() == 2 * token.numel(), (
        "a position without a target is still a token"
    )


def test_every_target_ignored_is_a_loss_of_zero_with_zero_gradients():
    model = small()
    token, target = batch()
    out = model(token, torch.full_like(target, -100))
    out.loss_sum.backward()
    assert out.loss_sum == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_padding_named_by_the_context_is_not_routed():
    token, _ = batch()
    valid = torch.ones_like(token, dtype=torch.bool)
    valid[0, 7:] = False
    out = small()(token, context=TokenContext(valid_T=valid.flatten()))
    assert all(stats.choice_E.sum() == 2 * valid.sum() for stats in out.stats)


@pytest.mark.parametrize(
    ("every", "first", "sparse"),
    [
        (1, 0, [0, 1, 2, 3, 4, 5]),
        (2, 0, [1, 3, 5]),
        (1, 2, [2, 3, 4, 5]),
        (2, 1, [2, 4]),
        (3, 1, [3]),
        (0, 0, []),
        (1, 6, []),
    ],
)
def test_which_blocks_are_sparse(every, first, sparse):
    model = small(layers=6, moe_every=every, dense_first=first)
    assert [
        i for i, block in enumerate(model.blocks) if isinstance(block.feed_forward, MoE)
    ] == sparse
    assert [layer.layer for layer in model.moe_layers()] == list(range(len(sparse)))
    out = model(batch()[0])
    assert len(out.aux) == len(out.stats) == len(sparse)
    assert all(aux.keys() == {"switch", "z"} for aux in out.aux)


def test_a_dense_block_is_as_wide_as_a_sparse_one_is_active():
    moe = replace(MOE, experts=ExpertsConfig(kind="relu", shared=2, shared_dim=5))
    dense = small(moe, dense_first=1).blocks[0].feed_forward
    assert isinstance(dense, FeedForward)
    assert dense.w_in.weight.shape == (2 * 12 + 2 * 5, 16)
    assert dense.kind == "relu"
    assert small(moe, dense_first=1, dense_dim=9).blocks[0].feed_forward.w_in.weight.shape == (
        9,
        16,
    )


def test_parameters_are_counted_from_shapes_even_where_only_some_experts_are_held():
    with torch.device("meta"):
        model = Transformer(replace(MODEL, dense_first=1), MOE, VOCAB)
    count = model.num_parameters()
    one_expert = 3 * 16 * 12
    assert count.total == sum(p.numel() for p in model.parameters())
    assert count.total - count.active == 2 * (4 - 2) * one_expert
    assert count.embedding == VOCAB * 16
    for layer in model.moe_layers():
        layer.experts.slice_experts(2, 2)
    assert model.num_parameters() == count


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_flops_are_those_torch_counts(tied, qk_norm):
    """torch counts attention as two full products; the half above the diagonal is subtracted."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, length = small(moe_every=0, tie_embeddings=tied, qk_norm=qk_norm), 10
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch(1, length)[0])
    above = 2 * 3 * 16 * (length - 1)  # 2 * layers * H*A * (2S - (S+1)) a token
    assert model.flops_per_token(length) * length == counter.get_total_flops() - above * length
    sparse = small(tie_embeddings=tied, qk_norm=qk_norm)
    router = 2 * 3 * 4 * 16
    assert sparse.flops_per_token(length) == model.flops_per_token(length) + router


def test_tied_embeddings_are_one_parameter():
    tied, separate = small(tie_embeddings=True), small(tie_embeddings=False)
    assert tied.output is None
    assert "output.weight" not in tied.state_dict()
    assert separate.num_parameters().total - tied.num_parameters().total == VOCAB * 16
    hidden = []
    tied.norm.register_forward_hook(lambda module, args, out: hidden.append(out))
    logits = tied(batch()[0]).logits
    torch.testing.assert_close(logits, hidden[0] @ tied.embedding.weight.t())


@pytest.mark.parametrize("recompute", [False, True])
def test_bfloat16_autocast_runs_and_is_near_float32(recompute):
    model = small(recompute=recompute, init_std=0.05).float()
    token, target = batch()
    exact = model(token, target).loss_sum
    with torch.autocast("cpu", torch.bfloat16):
        out = model(token, target, return_logits=True)
    total_loss(out, target.numel()).backward()
    assert out.logits.dtype == torch.bfloat16
    assert out.loss_sum.dtype == torch.float32
    torch.testing.assert_close(out.loss_sum, exact, rtol=1e-2, atol=0)
    assert all(
        p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all()
        for p in model.parameters()
    )


def test_state_dict_holds_parameters_and_the_routers_biases():
    model = Transformer(ModelConfig(dim=16, heads=2, layers=1), MOE, VOCAB)
    biases = {"blocks.0.feed_forward.router.bias_E"}
    assert model.state_dict().keys() == dict(model.named_parameters()).keys() | biases
