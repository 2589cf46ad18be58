"""Input composition: soft prompts and prefixes, learned vectors at the first positions.

The caller prepends P tokens of any id to each sequence (`with_prefix_tokens`) and ignores their
targets. So positions, masks and output length need no change in the model. A call with no more than
P positions is refused: step-by-step decoding with a key/value cache is not supported.

Letters: M modules, R rows, B sequences, P prefix positions, O width of the frozen output,
S positions of a sequence including its prefix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe.config.errors import ConfigError
from dmoe.modular.banks.base import AdapterBank, grouped_product
from dmoe.moe.interfaces import TokensPerExpert
from dmoe.moe.rng import normal_


class Prompt(AdapterBank):
    """Soft prompts (Lester et al. 2021), attached to the token embedding.

    y[b, s] = sum over the selected m of weight[b, m] * p_m[s]  for s < P;  frozen output otherwise

    Routing is per sequence: a learned router reads the mean of the frozen output after the prefix.
    A new prompt is random: no prompt is neutral. Cost: B * P * O numbers per call. Under EP a
    sequence's row is sent with width 1 and returned with width P * O.
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
        """Create the bank.

        Args:
            num_modules: M.
            in_dim, out_dim: widths of the target module.
            length: P.
            columns: (start, stop) of the frozen output's columns that are overwritten. None: all.
            std: standard deviation of the initial vectors.
        """
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
        """Return the vectors [R, P * columns]; rows [R, 1] are 1 per sequence, 0 in empty slots."""
        return grouped_product(rows_RD, self.vector.flatten(1).unsqueeze(1), tokens_per_module)

    def reference(self, row_D: Tensor, module: int) -> Tensor:
        return row_D * self.vector[module].flatten()

    def init_module(self, local: int, seed: int, layer: int, module: int) -> None:
        normal_(self.vector[local], self.std, seed, "module", layer, module, "vector")

    def add_to_output(self, y: Tensor, contribution: Tensor) -> Tensor:
        """Overwrite the first P positions of y [..., S, O] with the contribution."""
        head, tail = y[..., : self.length, :], y[..., self.length :, :]
        start, stop = self.columns.start, self.columns.stop
        written = contribution.view(*head.shape[:-1], stop - start)
        return torch.cat([torch.cat([head[..., :start], written, head[..., stop:]], -1), tail], -2)


class Prefix(Prompt):
    """Prefixes (Li and Liang 2021): learned keys and values in every layer.

    k[b, s] = sum over the selected m of weight[b, m] * key_m[s],  v likewise,  for s < P

    Attach it to the modules that compute keys and values, in each layer: `k_proj` and `v_proj` of a
    Hugging Face model. The reference transformer's `w_qkv` stacks queries, keys and values, so give
    it `columns`, the range of the keys and values. The vectors at the placeholders are not read by
    later positions, because their keys and values are overwritten in every layer. Keys are written
    before the rotation, which at a fixed position is a fixed rotation of the learned key.
    """


def with_prefix_tokens(token_BS: Tensor, num_prefix_tokens: int, fill: int = 0) -> Tensor:
    """Prepend placeholder tokens to each sequence, for prompts and prefixes.

    Args:
        token_BS: int64 [B, S]: token ids or targets.
        num_prefix_tokens: P.
        fill: id of the placeholders; for targets the id that the loss ignores.

    Returns:
        int64 [B, P + S].
    """
    prefix_BP = token_BS.new_full((len(token_BS), num_prefix_tokens), fill)
    return torch.cat([prefix_BP, token_BS], 1)
