"""Sampling: greedy is argmax, a draw is a function of the seed, filters keep what they say."""

from __future__ import annotations

import pytest
import torch

from dmoe.models.generate import generate, sample_token
from dmoe.moe.rng import generator
from tests.models.small import VOCAB, small

PROMPT = [1, 2, 3]


def test_greedy_equals_an_argmax_loop():
    model = small()
    ids = list(PROMPT)
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids[-5:]])).logits[0, -1].argmax()))
    assert generate(model, PROMPT, 6, window=5, temperature=0.0) == ids[3:]


def test_a_draw_depends_on_the_seed_alone():
    model = small(init_std=0.02)
    first = generate(model, PROMPT, 12, window=8, seed=1)
    torch.rand(3)
    assert generate(model, PROMPT, 12, window=8, seed=1) == first
    assert generate(model, PROMPT, 12, window=8, seed=2) != first
    assert len(first) == 12
    assert all(0 <= token < VOCAB for token in first)


def test_a_stop_token_ends_the_text_and_is_left_out():
    model = small()
    free = generate(model, PROMPT, 8, window=8, temperature=0.0)
    assert (
        generate(model, PROMPT, 8, window=8, temperature=0.0, stop={free[2]})
        == free[: free.index(free[2])]
    )


def test_mode_and_virtual_ranks_are_restored_and_a_lone_sequence_need_not_divide():
    model = small(virtual_ranks=2).train()
    assert generate(model, PROMPT, 2, window=8, temperature=0.0)
    assert model.training
    assert [layer.virtual_ranks for layer in model.moe_layers()] == [2, 2, 2]
    assert all(not p.is_inference() for p in model.parameters())


def frequency(**filters: float) -> torch.Tensor:
    logits, rng = torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), generator(0)
    options = {"temperature": 1.0, "top_k": None, "top_p": None} | filters
    picked = [sample_token(logits, rng=rng, **options) for _ in range(4000)]
    return torch.bincount(torch.tensor(picked), minlength=4) / 4000


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"top_k": 2}, [0.625, 0.375, 0.0, 0.0]),
        ({"top_p": 0.7}, [0.625, 0.375, 0.0, 0.0]),
        ({"top_p": 0.01}, [1.0, 0.0, 0.0, 0.0]),
        ({"top_k": 9, "top_p": 1.0}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.0}, [1.0, 0.0, 0.0, 0.0]),
        ({"temperature": 0.5}, [0.6849, 0.2466, 0.0616, 0.0068]),
    ],
)
def test_tokens_are_drawn_with_the_filtered_probabilities(filters, expected):
    torch.testing.assert_close(frequency(**filters), torch.tensor(expected), rtol=0, atol=0.03)


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": 0},
        {"temperature": -1.0},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"prompt_ids": []},
    ],
)
def test_impossible_arguments_are_refused_with_their_name(wrong):
    arguments = {"prompt_ids": PROMPT, "max_tokens": 1, "window": 8} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        generate(small(), **arguments)
