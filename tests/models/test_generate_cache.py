"""A key-value cache changes no token: the naive rule computes the context again for each."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from dmoe.config.schema import CapacityConfig, ExpertsConfig, MoEConfig, RouterConfig
from dmoe.distributed.expert_parallel import shard_experts
from dmoe.distributed.local_ranks import run_ranks
from dmoe.distributed.mesh import build_mesh
from dmoe.models import next_logits
from dmoe.models.decode import can_decode
from dmoe.models.generate import generate, generate_batch
from dmoe.models.next_logits import context_start, uncached_reason
from dmoe.models.transformer import Transformer
from dmoe.modular import LoRA, attach, constant
from dmoe.moe.routing import TokenContext
from tests.models.small import VOCAB, small

WINDOW = 9
PROMPTS = ([1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16])


def moe(kind: str = "top_k", **options: Any) -> MoEConfig:
    sections = {name: options.pop(name) for name in ("capacity", "experts") if name in options}
    top_k = 4 if kind == "soft" else 2
    return MoEConfig(4, top_k, 12, router=RouterConfig(kind=kind, **options), **sections)


MODELS = {
    "grouped queries": {},
    "one head each, norms, tied": {"kv_heads": None, "qk_norm": True, "tie_embeddings": True},
    "dense first": {"dense_first": 1},
    "sigmoid": {"moe": moe(score="sigmoid")},
    "adaptive": {"moe": moe("adaptive", top_p=0.5, renormalize=False)},
    "noisy": {"moe": moe("noisy")},
    "group limited": {"moe": moe("group_limited", groups=2, topk_groups=1)},
    "fixed": {"moe": moe("fixed")},
    "hash": {"moe": moe("hash")},
    "soft": {"moe": moe("soft")},
    "budget": {"moe": moe("budget", budget=0.3, renormalize=False)},
    "zero-cost and shared": {"moe": moe(experts=ExpertsConfig(zero=1, copy=1, shared=1))},
    "expert widths": {"moe": moe(experts=ExpertsConfig(shapes=[[12], [4], [8], [6]]))},
}


def naive(model: Transformer, prompt: list[int], count: int, label: int = 0) -> list[int]:
    """Take the most likely token of a forward over all that the rule lets it see."""
    ids = list(prompt)
    for _ in range(count):
        start = 0
        while len(ids) - start > WINDOW:
            start += WINDOW // 2
        token_BS = torch.tensor([ids[start:]])
        context = TokenContext(label_T=torch.full_like(token_BS[0], label))
        ids.append(int(model.eval()(token_BS, context=context).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
def test_cached_tokens_equal_the_naive_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and sampled, alone and in a batch with padding, across the window."""
    options = dict(MODELS[name])
    model = small(options.pop("moe", moe()), layers=2, **options)
    assert uncached_reason(model) is None
    assert can_decode(model)
    label = 1 if name == "fixed" else 0
    expected = [naive(model, prompt, 14, label) for prompt in PROMPTS]
    greedy = {"window": WINDOW, "temperature": 0.0, "label": label}
    assert [generate(model, prompt, 14, **greedy) for prompt in PROMPTS] == expected
    assert generate_batch(model, PROMPTS, 14, **greedy) == expected
    drawn = {"window": WINDOW, "temperature": 1.3, "top_k": 9, "seed": 4, "label": label}
    slow = generate_batch(model, PROMPTS, 14, use_cache=False, **drawn)
    assert generate_batch(model, PROMPTS, 14, **drawn) == slow
    monkeypatch.setattr(next_logits, "can_decode", lambda model: False)
    assert generate_batch(model, PROMPTS, 14, **drawn) == slow, "by the model's own forward"


def test_each_new_token_costs_one_position() -> None:
    """While a text fits the window, and beyond it but for one token in half a window."""
    model, rows = small(), list[int]()
    count = model.blocks[0].feed_forward.router.register_forward_hook(
        lambda module, args, out: rows.append(len(args[0]))
    )
    generate(model, PROMPTS[0], 16, window=8)
    count.remove()
    # 3 + 1 .. 8, then the last 5 of 9, 6, 7, 8, the last 5 of 13 ...
    assert rows == [3, 1, 1, 1, 1, 1, 5, 1, 1, 1, 5, 1, 1, 1, 5, 1]


def test_context_start_is_a_function_of_the_length() -> None:
    for window in (1, 2, 3, 8, 9):
        starts = [context_start(length, window) for length in range(1, 60)]
        assert starts == sorted(starts)
        for length, start in enumerate(starts, 1):
            seen = length - start
            assert (
                seen == length
                if length <= window
                else window - max(1, window // 2) < seen <= window
            )


def test_a_batch_draws_for_each_prompt_and_may_come_in_parts() -> None:
    model = small(init_std=0.02)
    drawn = {"window": WINDOW, "seed": 3}
    whole = generate_batch(model, [[1, 2]] * 3, 12, **drawn)
    assert len({tuple(ids) for ids in whole}) == 3
    parts = [generate_batch(model, [[1, 2]], 12, first=index, **drawn)[0] for index in range(3)]
    assert parts == whole


def test_texts_end_by_themselves() -> None:
    """By a stop token, by the callback, by the number of tokens: others go on unchanged."""
    model = small()
    greedy = {"window": WINDOW, "temperature": 0.0}
    free = generate_batch(model, PROMPTS, 15, **greedy)
    seen: list[tuple[int, int]] = []

    def on_token(index: int, token: int) -> bool:
        seen.append((index, token))
        return index == 2 and len([s for s in seen if s[0] == 2]) == 4

    stop = free[0][5]
    cut = [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    cut[2] = cut[2][:4]
    assert len({len(ids) for ids in cut}) > 1
    assert generate_batch(model, PROMPTS, 15, stop={stop}, on_token=on_token, **greedy) == cut
    assert [[t for i, t in seen if i == index] for index in range(3)] == cut


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (moe("expert_choice", allow_future_leak=True), "expert_choice"),
        (moe("budget", per="sequence", renormalize=False, allow_future_leak=True), "budget"),
        (moe(capacity=CapacityConfig(eval_factor=1.0)), "eval_factor"),
    ],
)
def test_where_tokens_share_experts_the_context_is_computed_again(
    config: MoEConfig, reason: str
) -> None:
    model = small(config)
    assert reason in str(uncached_reason(model))
    greedy = {"window": WINDOW, "temperature": 0.0}
    slow = [naive(model, prompt, 12) for prompt in PROMPTS]
    assert generate_batch(model, PROMPTS, 12, **greedy) == slow


def test_attached_modules_are_computed_again() -> None:
    model = small()
    attach(model, "*.attention.w_out", partial(LoRA, 2, rank=2), constant(0.5, 0.5))
    model.double()
    assert "modules" in str(uncached_reason(model))
    assert generate(model, [1, 2], 3, window=4)


def test_hooks_and_subclasses_are_not_bypassed() -> None:
    hooked = small()
    hooked.blocks[1].attention.register_forward_hook(lambda module, args, out: out * 0)
    assert not can_decode(hooked)
    prompt = PROMPTS[0]
    greedy = {"window": WINDOW, "temperature": 0.0}
    assert generate(hooked, prompt, 9, **greedy) == naive(hooked, prompt, 9)

    class Own(Transformer):
        pass

    assert not can_decode(Own(hooked.config, moe(), VOCAB))


def test_bf16_autocast_decodes_like_the_forward() -> None:
    """The logits of one step are within bf16's rounding of the naive rule's."""
    model = small().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        texts = [next_logits.Text([1, 2, 3, 4], torch.Generator())]
        cached = next_logits.Cached(model, WINDOW, 0, 8)
        cached(texts)
        texts[0].ids.append(5)
        fast = cached(texts)
        slow = next_logits.Recomputed(model, WINDOW, 0)(texts)
    assert fast.dtype == slow.dtype == torch.bfloat16
    torch.testing.assert_close(fast, slow, rtol=0.05, atol=0.05)


def _on_a_rank(rank: int, world: int) -> list[list[list[int]]]:
    found = []
    for config in (moe(), moe(experts=ExpertsConfig(zero=1, copy=1))):
        model = small(config)
        shard_experts(model, build_mesh(world, torch.device("cpu")))
        found.append(generate_batch(model, PROMPTS, 14, window=WINDOW, temperature=0.0))
    return found


@pytest.mark.ranks
def test_two_ranks_with_half_of_the_experts_generate_the_same() -> None:
    expected = [
        [naive(small(config), prompt, 14) for prompt in PROMPTS]
        for config in (moe(), moe(experts=ExpertsConfig(zero=1, copy=1)))
    ]
    assert run_ranks(2, _on_a_rank) == [expected, expected]
