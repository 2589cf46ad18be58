"""Generate text from a model, one token at a time.

The whole window is computed again for every token: S times the work of a key/value cache, but with
exactly the forward of training and evaluation, so there is no second implementation.

Letters: B = 1 sequence, S tokens in the window, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dmoe.models.base import Model
from dmoe.moe.interfaces import NoComm
from dmoe.moe.rng import generator
from dmoe.moe.routing import TokenContext


def generate(
    model: Model,
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
    """Sample up to `max_tokens` tokens after the prompt.

    Under expert parallelism every rank must make the same call. The model's mode is restored.

    Args:
        model: any mode; evaluation mode is used.
        prompt_ids: at least one token.
        max_tokens: most tokens to generate.
        window: number of last tokens that each new token sees; use `data.seq_len`.
        temperature: 0 takes the most likely token; else the draw depends on (seed, logits) alone.
        top_k: keep the k most likely tokens; None keeps all.
        top_p: keep the fewest tokens whose probabilities reach p (Holtzman et al. 2019).
        seed: of the draw.
        stop: tokens that end the text; they are not returned.
        label: task, language or domain of the text, for fixed routing.

    Returns:
        The new tokens.
    """
    _check_arguments(prompt_ids, window, temperature, top_k, top_p)
    device = next(model.parameters()).device
    rng = generator(seed, "generate")
    ids = list(prompt_ids)
    # no_grad and not inference_mode: see train/evaluation.py.
    with sampling_mode(model), torch.no_grad():
        for _ in range(max_tokens):
            token_BS = torch.tensor([ids[-window:]], device=device)
            context = TokenContext(label_T=torch.full_like(token_BS[0], label))
            logits_BSV = model(token_BS, context=context).logits
            token = sample_token(logits_BSV[0, -1], temperature, top_k, top_p, rng)
            if token in stop:
                break
            ids.append(token)
    return ids[len(prompt_ids) :]


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
def sampling_mode(model: Model) -> Iterator[None]:
    """Switch to evaluation mode with one group of tokens and no communication.

    A single sequence need not be divisible by the virtual ranks, and the copies that other ranks
    sample must not take its slots (`capacity.group: global` with an `eval_factor`).
    """
    training, layers = model.training, model.moe_layers()
    saved = [(layer.virtual_ranks, layer.comm) for layer in layers]
    model.eval()
    for layer in layers:
        layer.virtual_ranks, layer.comm = 1, NoComm()
    try:
        yield
    finally:
        model.train(training)
        for layer, (virtual_ranks, comm) in zip(layers, saved, strict=True):
            layer.virtual_ranks, layer.comm = virtual_ranks, comm
