"""Soft prompts (Lester et al. 2021). Input composition: P learned vectors stand at the first P positions of a sequence.

    y[b, s] = sum over the chosen m of weight[b, m] * p_m[s]   for s < P;      y[b, s] = frozen output[b, s]   behind them

Attached to the token embedding. The caller makes room: P tokens, of any id, in front of each sequence (`with_room`), whose targets are
ignored; so positions, masks and the length of the output stay what the model thinks they are. Routing is by sequence: a learned router
sees the mean of the frozen output behind the prompt. A fresh prompt is random, not neutral: there is no neutral one.

Not for decoding step by step with a key/value cache, where the first position of a call is not that of the sequence; a call with no
more than P positions is refused. Cost: B * P * O numbers a call; under EP a sequence's row travels with width 1 there and P * O back.

Letters: M modules, R rows, B sequences, P positions, O width of the frozen output, S positions of a sequence with its room.

Prefixes (Li and Liang 2021). Input composition at every layer: P learned keys and values that every later position attends to.

    k[b, s] = sum over the chosen m of weight[b, m] * key_m[s],   v alike,   for s < P

Attached to what computes keys and values, by layer: for a Hugging Face model a bank on each `k_proj` and `v_proj`; for the reference
transformer, whose `w_qkv` stacks queries, keys and values, with `columns=(first, last + 1)` of the keys and values. Room is made as
for a prompt (`prompt.py`), whose rules and costs these are. What stands at the placeholders' positions is read by nobody, since
their keys and values are overwritten in every layer. Keys are written before the rotation, which at a fixed position is a fixed turn
of the learned key.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.modular.banks.base import AdapterBank, grouped_product
from dmoe.moe.dispatch import TokensPerExpert
from dmoe.moe.rng import normal_


class Prompt(AdapterBank):
    """Args:
    length: P.
    columns: (start, stop) of the frozen output that are written; None, all.
    std: of the initial vectors.
    """

    composition = "input"
    input_kind = "sequence"

    def __init__(
        self,
        num_modules: int,
        in_dim: int,
        out_dim: int,
        *,
        length: int = 8,
        columns: tuple[int, int] | None = None,
        std: float = 0.02,
    ) -> None:
        super().__init__(num_modules, in_dim, out_dim)
        start, stop = (0, out_dim) if columns is None else columns
        if length < 1:
            raise ConfigError("length", length, "must be at least 1", "use 5 to 100")
        if not 0 <= start < stop <= out_dim:
            raise ConfigError(
                "columns",
                columns,
                f"must be a part of 0 to {out_dim}",
                "give (start, stop) of the keys and values",
            )
        self.length, self.std, self.columns = length, std, slice(start, stop)
        self.num_prefix_tokens = length
        self.width = length * (stop - start)
        self.vector = nn.Parameter(torch.empty(num_modules, length, stop - start))
        self.initialize(0, 0)

    def forward(self, rows_RD: Tensor, tokens_per_module: TokensPerExpert) -> Tensor:
        """rows [R, 1] hold a one for each sequence, and a zero in an empty slot."""
        return grouped_product(rows_RD, self.vector.flatten(1).unsqueeze(1), tokens_per_module)

    def reference(self, row_D: Tensor, module: int) -> Tensor:
        return row_D * self.vector[module].flatten()

    def init_module(self, local: int, seed: int, layer: int, module: int) -> None:
        normal_(self.vector[local], self.std, seed, "module", layer, module, "vector")

    def add_to_output(self, y: Tensor, contribution: Tensor) -> Tensor:
        head, tail = y[..., : self.length, :], y[..., self.length :, :]
        written = contribution.view(*head.shape[:-1], self.columns.stop - self.columns.start)
        left, right = head[..., : self.columns.start], head[..., self.columns.stop :]
        return torch.cat([torch.cat([left, written, right], -1), tail], -2)


def with_prefix_tokens(token_BS: Tensor, length: int, fill: int = 0) -> Tensor:
    """[B, P+S]: `length` placeholders in front of each sequence. For targets, `fill` is the id that the loss ignores."""
    return torch.cat([token_BS.new_full((len(token_BS), length), fill), token_BS], 1)


class Prefix(Prompt):
    """A prompt that is written into keys and values: attach it to what computes them, in every layer. Arguments as `Prompt`."""
