"""Logits of the next token of texts: from a key-value cache, or from the whole context.

A new token sees the last tokens of its text from `context_start` on. While the text fits the window
that is all of it. A longer text loses the older half of its window at once: a network of several
layers computes every position from all before it, so without the oldest token every position has to
be computed again, once per W/2 tokens here instead of once per token.

Letters: B texts, S tokens of a context, W the window, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dmoe.config.plugins import label as label_of
from dmoe.config.router_kinds import ROUTERS, router_spec
from dmoe.models.decode import Decoder, can_decode
from dmoe.models.key_value_cache import KeyValueCache
from dmoe.models.transformer import Transformer
from dmoe.moe.interfaces import ExpertLayer
from dmoe.moe.layer import MoE
from dmoe.moe.routing import TokenContext


def context_start(length: int, window: int) -> int:
    """Return the first token that the one after `length` tokens sees.

    0 while they fit the window, then a multiple of half the window: the start moves W/2 tokens at
    once, and a token sees more than W/2 and at most W tokens.
    """
    half = max(1, window // 2)
    return max(0, -(-(length - window) // half) * half)


def uncached_reason(model: Transformer) -> str | None:
    """Return why the tokens of a context have to be computed together, or None.

    Then a past token's vectors would change with the tokens after it, or the rule is not known.
    """
    for module in model.modules():
        if not isinstance(module, MoE):
            if isinstance(module, ExpertLayer):
                return "modules are attached, whose routing may read a whole sequence"
            continue
        router, kind = module.router.config, module.router.config.kind
        if module.capacity.eval_factor is not None:
            return "moe.capacity.eval_factor makes the tokens of a text share each expert's slots"
        if kind not in ROUTERS:
            return f"moe.router.kind={label_of(kind)} may read a whole sequence"
        if router_spec(kind).looks_ahead or (
            router_spec(kind).has_budget and router.per == "sequence"
        ):
            return f"moe.router.kind={kind} chooses for all tokens of a sequence together"
    return None


@dataclass
class Text:
    """A text that is being generated."""

    ids: list[int]
    rng: torch.Generator


class Recomputed:
    """Computes each text's whole context for every token: the definition, for any model."""

    def __init__(self, model: Transformer, window: int, label: int) -> None:
        self.model, self.window, self.label = model, window, label

    def __call__(self, texts: Sequence[Text]) -> Tensor:
        """Return the logits of the next token of each text, [B, V]."""
        return torch.cat([self._forward([context])[:, -1] for context in self._contexts(texts)])

    def _contexts(self, texts: Sequence[Text]) -> list[list[int]]:
        return [text.ids[context_start(len(text.ids), self.window) :] for text in texts]

    def _forward(
        self,
        token_BS: list[list[int]],
        valid_BS: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Return the logits of all positions, [B, S, V]."""
        token = torch.tensor(token_BS, device=self.model.embedding.weight.device)
        context = TokenContext(label_T=torch.full_like(token.flatten(), self.label))
        if valid_BS is not None:
            context = replace(context, valid_T=valid_BS.flatten())
        cached = {} if cache is None else {"cache": cache}  # the hooks of a prefix know no cache
        logits: Tensor = self.model(token, context=context, **cached).logits
        return logits


class Cached(Recomputed):
    """Computes the new token of each text, and the contexts anew when the cache is full.

    No context moves before: it fits the window as long as it fits the cache.

    Args:
        model, window, label: see `generate_batch`.
        max_tokens: most tokens to come; the cache has place for these at most.
    """

    cache: KeyValueCache
    texts: Sequence[Text] = ()
    """The texts in the cache, one per sequence."""

    def __init__(self, model: Transformer, window: int, label: int, max_tokens: int) -> None:
        super().__init__(model, window, label)
        self.max_tokens = max_tokens
        self.decoder = Decoder(model) if can_decode(model) else None

    def __call__(self, texts: Sequence[Text]) -> Tensor:
        rows = [row for row, text in enumerate(self.texts) if any(text is t for t in texts)]
        if not rows or self.cache.length == self.cache.columns:
            logits_BSV = self._fill(texts)
        else:
            if len(rows) < len(self.texts):
                self.cache.keep(rows)
            logits_BSV = self._step([text.ids[-1] for text in texts])
        self.texts = texts
        return logits_BSV[:, -1]

    def _step(self, tokens: list[int]) -> Tensor:
        """Return the logits after one more token of each text, [B, 1, V]."""
        if self.decoder is None:
            return self._forward([[token] for token in tokens], cache=self.cache)
        token_B = torch.tensor(tokens, device=self.model.embedding.weight.device)
        label_B = torch.full_like(token_B, self.label)
        context = TokenContext(token_id_T=token_B, label_T=label_B)
        return self.decoder.step(token_B, context, self.cache).unsqueeze(1)

    def _fill(self, texts: Sequence[Text]) -> Tensor:
        """Start a new cache with the contexts, padded on the left to one length."""
        contexts = self._contexts(texts)
        columns = max(map(len, contexts))
        padding = [columns - len(context) for context in contexts]
        weight, config = self.model.embedding.weight, self.model.config
        self.cache = KeyValueCache(
            config.layers,
            min(self.window, columns + self.max_tokens),
            self.model.head_dim,
            config.rope_base,
            padding=padding,
            device=weight.device,
            dtype=weight.dtype,
        )
        padded = [[0] * count + ids for count, ids in zip(padding, contexts, strict=True)]
        valid_BS = None
        if any(padding):
            column_S = torch.arange(columns, device=weight.device)
            valid_BS = column_S >= torch.tensor(padding, device=weight.device).unsqueeze(1)
        return self._forward(padded, valid_BS, self.cache)
