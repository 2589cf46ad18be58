"""Inputs of a layer: cast or reshaped where they enter, or refused in a sentence.

The hash router sent a token to other experts if its id came as int32, whose products overflow; a
mask [B, S] or of integers, a wrong width and a lone vector ended in torch's words.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dmoe import MoE
from dmoe.config.errors import ConfigError
from dmoe.config.schema import ModelConfig, MoEConfig, RouterConfig
from dmoe.models.transformer import Transformer
from dmoe.modular import LoRA, adapter_context, attach, table
from dmoe.moe.routers import build_router
from dmoe.moe.routing import TokenContext
from tests.moe.layers import DIM, make, tokens_of

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.uint16)
WRONG: dict[str, tuple[Any, str]] = {
    "width": (torch.zeros(2, 3, DIM + 1), r"x=float32\[2, 3, 7\]: .*dim=6; project it to 6"),
    "one vector": (torch.zeros(DIM), r"x=float32\[6\]: .*unsqueeze\(0\)"),
    "a scalar": (torch.zeros(()), r"x=float32\[\]"),
    "token ids": (torch.zeros(2, DIM, dtype=torch.int64), r"x=int64\[2, 6\]: .*embed token ids"),
    "bool": (torch.ones(2, DIM, dtype=torch.bool), r"x=bool\[2, 6\]"),
    "complex": (torch.zeros(2, DIM, dtype=torch.complex64), r"x=complex64"),
    "a list": ([[0.0] * DIM], r"x=list: must be"),
    "nothing": (None, r"x=NoneType"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_input_is_a_sentence(name: str) -> None:
    x, words = WRONG[name]
    with pytest.raises(ConfigError, match=words):
        make()(x)


def test_the_output_of_a_layer_is_no_input() -> None:
    output = make()(tokens_of(2, 3))
    with pytest.raises(ConfigError, match=r"x=MoEOutput: .*pass its y"):
        make()(output)


@pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS])
@pytest.mark.parametrize("shape", [(2, 3), (6,), (2, 3, 1), (1, 2, 3)])
def test_masks_of_any_shape_and_width(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer, x = make(), tokens_of(2, 3)
    valid_T = torch.tensor([True, True, False, True, False, False])
    expected = layer(x, TokenContext(valid_T=valid_T))
    got = layer(x, TokenContext(valid_T=valid_T.view(shape).to(dtype)))
    assert torch.equal(got.y, expected.y)
    assert torch.equal(got.stats.choice_E, expected.stats.choice_E)
    assert int(got.stats.choice_E.sum()) == 2 * 3


def test_a_mask_of_a_batch_for_flat_tokens() -> None:
    layer, x = make(), tokens_of(6)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert int(layer(x, TokenContext(valid_T=mask)).stats.choice_E.sum()) == 2 * 3


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(3, 2, dtype=torch.bool), r"valid_T=bool\[3, 2\]: .*\[2, 3\] or \[6\]"),
        (torch.ones(5, dtype=torch.bool), r"valid_T=bool\[5\]"),
        (torch.ones(2, 1, dtype=torch.bool), r"valid_T=bool\[2, 1\]"),
        (torch.ones(2, 3), r"valid_T=float32\[2, 3\]: must be bool"),
        (torch.zeros(2, 3) - torch.inf, r"must be bool"),
        (torch.full((2, 3), 2), r"valid_T=int64\[2, 3\]: .*holds others"),
        (torch.full((2, 3), -1), r"holds others"),
        ([True] * 6, r"valid_T=list"),
    ],
    ids=["transposed", "too short", "one per sequence", "float", "additive", "2", "-1", "a list"],
)
def test_other_masks_are_refused(mask: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()(tokens_of(2, 3), TokenContext(valid_T=mask))


def test_a_mask_in_place_of_a_context() -> None:
    with pytest.raises(ConfigError, match=r"context=bool\[.*\]: .*TokenContext\(valid_T=mask\)"):
        make()(tokens_of(2, 3), torch.ones(2, 3, dtype=torch.bool))


def routed_by(kind: str, name: str, value: Tensor) -> Tensor:
    router = build_router(RouterConfig(kind=kind), DIM, 12, 3, 1)  # type: ignore[arg-type]
    routing = router(torch.zeros(len(value), DIM), TokenContext(**{name: value}))
    expert_TK: Tensor = routing.expert_TK
    return expert_TK


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize(("kind", "name"), [("hash", "token_id_T"), ("fixed", "label_T")])
def test_experts_do_not_depend_on_the_width_of_an_integer(
    kind: str, name: str, dtype: torch.dtype
) -> None:
    """int32 overflows in the hash; `label * K` in uint8 wraps at 256."""
    value_T = torch.tensor([0, 1, 7, 100, 127, 200]).clamp(max=torch.iinfo(dtype).max)
    expected_TK = routed_by(kind, name, value_T)
    assert torch.equal(routed_by(kind, name, value_T.to(dtype)), expected_TK)


@pytest.mark.parametrize("value", [torch.ones(4), torch.ones(4, dtype=torch.bool), [1, 2]])
def test_ids_that_are_no_integers_are_refused(value: Any) -> None:
    for name in ("token_id_T", "label_T", "prior_count_LE"):
        with pytest.raises(ConfigError, match=f"{name}=.*tensor of integers"):
            TokenContext(**{name: value})


@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_model_takes_ids_and_targets_of_any_width(dtype: torch.dtype) -> None:
    """`cross_entropy` takes int64 only, an embedding int32 and int64; files hold uint16."""
    config = ModelConfig(dim=8, layers=1, heads=2)
    model = Transformer(config, MoEConfig(4, 2, 4, router=RouterConfig(kind="hash")), 50)
    token_BS = torch.randint(0, 50, (2, 4))
    expected = model(token_BS, token_BS).loss_sum
    got = model(token_BS.to(dtype), token_BS.to(dtype)).loss_sum
    assert expected is not None
    assert got is not None
    assert torch.equal(got, expected)
    with pytest.raises(ConfigError, match=r"input=float32\[2, 4\]: must be a tensor of integers"):
        model(token_BS.float())


def test_a_model_takes_a_mask_of_its_batch() -> None:
    model = Transformer(ModelConfig(dim=8, layers=2, heads=2), MoEConfig(4, 2, 4), 50)
    token_BS, mask = torch.randint(0, 50, (2, 4)), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    out = model(token_BS, token_BS, TokenContext(valid_T=mask))
    assert [int(stats.choice_E.sum()) for stats in out.stats] == [2 * 5] * 2


def test_modules_take_labels_of_any_width() -> None:
    """A table of modules is indexed by labels, which torch does only with int32 and int64."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    attach(model, "0", lambda width, out: LoRA(2, width, out, rank=2), table([[0], [1]], 2))
    x = torch.randn(2, 3, 4)
    with adapter_context(model, label_T=torch.tensor([1, 0])):
        expected = model(x)
    with adapter_context(model, label_T=torch.tensor([1, 0], dtype=torch.uint8)):
        assert torch.equal(model(x), expected)


def test_a_budget_in_the_context_is_not_lost() -> None:
    """It was replaced by the config's; for a router without a budget it was ignored."""
    router = RouterConfig(kind="budget", renormalize=False, min_weight=0.0)
    layer, x = make(experts_per_token=5, router=router), tokens_of(2, 3)
    by_argument = layer(x, compute_budget=0.4)
    by_context = layer(x, TokenContext(budget=0.4))
    assert torch.equal(by_argument.y, by_context.y)
    assert not torch.equal(by_argument.y, layer(x).y)
    for wrong in (-0.1, 1.5, float("nan"), "half", True):
        with pytest.raises(ConfigError, match=r"compute_budget=.*from 0 to 1"):
            layer(x, TokenContext(budget=wrong))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has no budget"):
        make()(x, TokenContext(budget=0.4))


def test_tokens_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"virtual_ranks=4: must divide the 6 tokens"):
        MoE(DIM, 4, 5, 2, virtual_ranks=4)(torch.zeros(2, 3, DIM))


@pytest.mark.parametrize("key", [(0,), 0, (0, 1, 2), ("a", 0), (0.5, 1), (True, 0), torch.ones(2)])
def test_other_keys_of_random_numbers_are_refused(key: Any) -> None:
    """A tensor's text was part of the key, so a GPU would draw other numbers than a CPU."""
    with pytest.raises(ConfigError, match=r"noise_key=.*must be two whole numbers"):
        TokenContext(noise_key=key)


def test_noise_without_a_key_is_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"noise_key=None: the router draws jitter in training"):
        make(router=RouterConfig(jitter=0.1))(tokens_of(2, 3))
