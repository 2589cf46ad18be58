"""Generate text from a model, one token at a time.

A key-value cache computes one position per token instead of the whole context. Where the tokens of
a text share experts (`uncached_reason`), the context is computed again for each token. Both draw
the same tokens, up to rounding: two tokens that are equally likely to the last digit may change
places. `next_logits.py` says what a token sees beyond the window.

Letters: B texts, W the window, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dmoe.config.schema import BalanceConfig
from dmoe.models.next_logits import Cached, Recomputed, Text, uncached_reason
from dmoe.models.transformer import Transformer
from dmoe.moe.interfaces import NoComm
from dmoe.moe.rng import generator

NO_LOSSES = BalanceConfig(switch=0.0, z=0.0)
OnToken = Callable[[int, int], bool]
"""Called with the index of a prompt and its next token; True ends that text after the token."""


def generate(
    model: Transformer,
    prompt_ids: Sequence[int],
    max_tokens: int,
    *,
    window: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Collection[int] = (),
    label: int = 0,
    use_cache: bool = True,
) -> list[int]:
    """Sample up to `max_tokens` tokens after one prompt. See `generate_batch`."""
    return generate_batch(
        model,
        [prompt_ids],
        max_tokens,
        window=window,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        label=label,
        use_cache=use_cache,
    )[0]


def generate_batch(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    window: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Collection[int] = (),
    label: int = 0,
    use_cache: bool = True,
    first: int = 0,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Sample up to `max_tokens` tokens after each prompt.

    Under expert parallelism every rank must make the same call. The model's mode is restored.

    Args:
        model: any mode; evaluation mode is used.
        prompts: token ids, at least one in each.
        max_tokens: most tokens to generate per prompt.
        window: W, most tokens that each new token sees; use `data.seq_len`.
        temperature: 0 takes the most likely token; else the draw depends on (seed, index of the
            prompt, logits) alone.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the fewest tokens whose probabilities reach p (Holtzman et al. 2019).
        seed: of the draw.
        stop: tokens that end the text; they are not returned.
        label: task, language or domain of the texts, for fixed routing.
        use_cache: keep keys and values, unless `uncached_reason` says why not.
        first: index of the first prompt, where the prompts of a list are given in parts.
        on_token: sees each token as it is drawn, and may end its text.

    Returns:
        The new tokens of each prompt.
    """
    _check_arguments(prompts, window, temperature, top_k, top_p)
    texts = [Text(list(ids), _generator(seed, first + index)) for index, ids in enumerate(prompts)]
    is_cached = use_cache and uncached_reason(model) is None
    next_logits = (
        Cached(model, window, label, max_tokens) if is_cached else Recomputed(model, window, label)
    )
    active = list(range(len(texts)))
    # no_grad and not inference_mode: see train/evaluation/__init__.py.
    with sampling_mode(model), torch.no_grad():
        for _ in range(max_tokens):
            if not active:
                break
            logits_BV, going = next_logits([texts[index] for index in active]), []
            for index, logits_V in zip(active, logits_BV.cpu(), strict=True):
                token = sample_token(logits_V, temperature, top_k, top_p, texts[index].rng)
                if token in stop:
                    continue
                texts[index].ids.append(token)
                if on_token is None or not on_token(index, token):
                    going.append(index)
            active = going
    return [text.ids[len(ids) :] for text, ids in zip(texts, prompts, strict=True)]


def _generator(seed: int, index: int) -> torch.Generator:
    """Return the generator of one prompt's draws; the first one's is that of a lone prompt."""
    return generator(seed, "generate", index) if index else generator(seed, "generate")


def sample_token(
    logits_V: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    rng: torch.Generator,
) -> int:
    """Draw one token from its logits.

    Computed on the CPU in float64, so that a GPU's logits give the same draw.

    Args:
        logits_V: of the next token.
        temperature: 0 takes the most likely token.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the fewest tokens whose probabilities reach p; None keeps all.
        rng: generator of the draw.
    """
    logits_V = logits_V.to("cpu", torch.float64)
    if temperature == 0:
        return int(logits_V.argmax())
    prob_V, id_V = (logits_V / temperature).softmax(-1).sort(descending=True, stable=True)
    if top_k is not None:
        prob_V[top_k:] = 0.0
    if top_p is not None:
        # A token is kept while the sum before it has not reached p, so the first one always is.
        prob_V[prob_V.cumsum(-1) - prob_V >= top_p * prob_V.sum()] = 0.0
    return int(id_V[torch.multinomial(prob_V, 1, generator=rng)])


def _check_arguments(
    prompts: Sequence[Sequence[int]],
    window: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if not all(len(ids) for ids in prompts):
        raise ValueError("prompt_ids is empty: give at least one token to continue from")
    if window < 1:
        raise ValueError(f"window={window}: must be at least 1; use data.seq_len")
    if temperature < 0:
        raise ValueError(f"temperature={temperature}: must not be negative; 0 is greedy")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1; leave it out to keep every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: must be in (0, 1]; leave it out to keep every token")


@contextmanager
def sampling_mode(model: Transformer) -> Iterator[None]:
    """Switch to evaluation mode with one group of tokens, no communication and no losses.

    A single sequence need not be divisible by the virtual ranks, and the copies that other ranks
    sample must not take its slots (`capacity.group: global` with an `eval_factor`).
    """
    training, layers = model.training, model.moe_layers()
    saved = [(layer.virtual_ranks, layer.comm, layer.balance) for layer in layers]
    model.eval()
    for layer in layers:
        layer.virtual_ranks, layer.comm, layer.balance = 1, NoComm(), NO_LOSSES
    try:
        yield
    finally:
        model.train(training)
        for layer, before in zip(layers, saved, strict=True):
            layer.virtual_ranks, layer.comm, layer.balance = before
