"""Sampling text from a model, one token at a time.

The whole window is computed again for every token: S times the work of a key/value cache, and exactly the forward that training and
evaluation use, so a sample can never come from a second implementation.

Letters: S tokens in the window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dmoe.models.transformer import Transformer
from dmoe.moe.comm import NoComm
from dmoe.moe.rng import generator
from dmoe.moe.routing import TokenContext


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
) -> list[int]:
    """Up to `max_tokens` new tokens after the prompt; a token in `stop` ends the text and is left out.

    Each token sees the last `window` ones (use the training's `seq_len`). Temperature 0 takes the most likely token; otherwise
    the draw depends on (seed, logits) alone. `top_k` keeps the k most likely tokens, `top_p` the fewest whose probabilities
    reach p (Holtzman et al. 2019). `label` is the text's task, language or domain, for fixed routing. Under expert parallelism
    every rank must make the same call. The model's mode is restored.
    """
    check(prompt_ids, window, temperature, top_k, top_p)
    device = model.embedding.weight.device
    draws = generator(seed, "generate")
    ids = list(prompt_ids)
    with evaluating(model), torch.no_grad():  # not inference_mode: see evaluation.py
        for _ in range(max_tokens):
            token_BS = torch.tensor([ids[-window:]], device=device)
            context = TokenContext(label_T=torch.full_like(token_BS[0], label))
            logits_BSV = model(token_BS, context=context).logits
            token = pick(logits_BSV[0, -1], temperature, top_k, top_p, draws)
            if token in stop:
                break
            ids.append(token)
    return ids[len(prompt_ids) :]


def pick(
    logits_V: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    draws: torch.Generator,
) -> int:
    """One token. Filtered and drawn on the CPU in float64, so that a GPU's logits give the same draw."""
    logits_V = logits_V.to("cpu", torch.float64)
    if temperature == 0:
        return int(logits_V.argmax())
    prob_V, id_V = (logits_V / temperature).softmax(-1).sort(descending=True, stable=True)
    if top_k is not None:
        prob_V[top_k:] = 0.0
    if (
        top_p is not None
    ):  # a token stays while what stands before it has not reached p, so the first always does
        prob_V[prob_V.cumsum(-1) - prob_V >= top_p * prob_V.sum()] = 0.0
    return int(id_V[torch.multinomial(prob_V, 1, generator=draws)])


def check(
    prompt_ids: Sequence[int],
    window: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if not prompt_ids:
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
def evaluating(model: Transformer) -> Iterator[None]:
    """Evaluation mode, one group of tokens, no peers: a lone sequence need not divide by the virtual ranks, and the copies of it that
    other ranks sample must not take its slots (`capacity.group: global` with an `eval_factor`)."""
    training, layers = model.training, model.moe_layers()
    before = [(layer.virtual_ranks, layer.comm) for layer in layers]
    model.eval()
    for layer in layers:
        layer.virtual_ranks, layer.comm = 1, NoComm()
    try:
        yield
    finally:
        model.train(training)
        for layer, (virtual_ranks, peers) in zip(layers, before, strict=True):
            layer.virtual_ranks, layer.comm = virtual_ranks, peers
