"""The base class of banks: M modules as stacked parameters [M, ...], applied to grouped rows.

A frozen network with modules is a mixture layer whose shared expert is the frozen part and whose
experts are the modules. So a bank keeps the contract of `dmoe.moe.experts.MLPExperts`:
`forward(rows, tokens_per_module)`, `shard`, `num_experts`, `first`, and an initialization keyed by
the global module id. It uses the same dispatchers and is sharded by the same `shard_experts`.

Letters: M modules of the bank, e modules on this rank (M/EP), R rows, D row width, W width of a
module's output, B sequences, I and O input and output width of a product.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dmoe.config.errors import ConfigError
from dmoe.moe.experts.grouped_product import grouped_linear
from dmoe.moe.interfaces import TokensPerExpert

Composition = Literal["parameter", "input", "function"]
"""How a module changes the network (Pfeiffer et al. 2023, section 3)."""
InputKind = Literal["input", "output", "sequence"]
"""A module's row: the target module's input, its output, or a constant 1 per sequence."""


class AdapterBank(nn.Module):
    """M modules for one target module.

    Every parameter and buffer is stacked on dimension 0, along which a bank is sharded and
    extended. A new bank is initialized for seed 0 and layer 0; `initialize` draws again.
    """

    composition: Composition
    input_kind: InputKind
    width: int
    """W, the width of one module's output for one row."""
    num_prefix_tokens = 0
    """Positions at the start of a sequence that the modules write and the router must not read."""

    def __init__(self, num_modules: int, in_dim: int, out_dim: int) -> None:
        """Create the bank; `in_dim` and `out_dim` are the widths of the target module."""
        super().__init__()
        if num_modules < 1:
            raise ConfigError("modules", num_modules, "must be at least 1", "use 1 or more")
        self.num_experts, self.first = num_modules, 0
        self.in_dim, self.out_dim, self.width = in_dim, out_dim, out_dim
        self.key = (0, 0)

    @property
    def num_modules(self) -> int:
        """M, over all ranks. Dispatchers read it as `num_experts`."""
        return self.num_experts

    @property
    def row_dim(self) -> int:
        """D, the width of a module's rows."""
        return {"input": self.in_dim, "output": self.out_dim, "sequence": 1}[self.input_kind]

    @property
    def local_modules(self) -> int:
        """Number e of modules on this rank."""
        return len(next(self.parameters()))

    @property
    def holds_all_modules(self) -> bool:
        """True unless the bank is sharded."""
        return self.local_modules == self.num_modules

    def forward(self, rows_RD: Tensor, tokens_per_module: TokensPerExpert) -> Tensor:
        """Return the modules' outputs [R, W] for rows [R, D] that are grouped by module.

        A module without rows gets a zero gradient, not None.
        """
        raise NotImplementedError

    def reference(self, row_D: Tensor, module: int) -> Tensor:
        """Return the output [W] of one module (local index) for one row, by the formula."""
        raise NotImplementedError

    def init_module(self, local: int, seed: int, layer: int, module: int) -> None:
        """Initialize one module.

        Args:
            local: index of the module on this rank.
            seed, layer, module: key of its random numbers; `module` is the global id.
        """
        raise NotImplementedError

    def bind(self, target: nn.Module) -> None:
        """Read what the bank needs from the target module, before `initialize`."""

    def add_to_output(self, y: Tensor, contribution: Tensor) -> Tensor:
        """Add the modules' contribution [T, W] to the target's output [..., S, out_dim]."""
        return y + contribution.view(y.shape)

    def weight_delta(self, local: int) -> Tensor:
        """Return the matrix [in_dim, out_dim] that a module adds to the weight in `x @ weight`.

        Raises: ConfigError for a bank whose modules are not such matrices.
        """
        raise ConfigError(
            "modules",
            type(self).__name__,
            "adds no matrix",
            "merge LoRA or SparseDelta, or average the modules",
        )

    def initialize(self, seed: int, layer: int) -> None:
        """Initialize every module from its own generator: equal for any EP size and any M."""
        self.key = (seed, layer)
        for local in range(self.local_modules):
            self.init_module(local, seed, layer, self.first + local)

    def stacked_tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers by name; dimension 0 of each is the module."""
        return {
            **dict(self.named_parameters(recurse=False)),
            **dict(self.named_buffers(recurse=False)),
        }

    def replace_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Replace parameters (by new parameters) and buffers.

        An optimizer that was created before still refers to the old parameters.
        """
        for name, value in tensors.items():
            if name in self._parameters:
                requires_grad = self.get_parameter(name).requires_grad
                setattr(self, name, nn.Parameter(value, requires_grad=requires_grad))
            else:
                setattr(self, name, value)

    def shard(self, first: int, count: int) -> None:
        """Keep only the modules with global ids `first` to `first + count - 1`."""
        self.first = first
        kept = {
            name: value.detach()[first : first + count].clone()
            for name, value in self.stacked_tensors().items()
        }
        self.replace_tensors(kept)

    def add_modules(self, count: int = 1) -> range:
        """Append `count` new modules and return their ids. The others keep their bits.

        Before sharding.
        """
        assert self.holds_all_modules, "modules are added before the bank is sharded"
        before = self.num_modules
        extended = {
            name: torch.cat([value.detach(), value.detach()[:1].expand(count, *value.shape[1:])])
            for name, value in self.stacked_tensors().items()
        }
        self.replace_tensors(extended)
        self.num_experts = before + count
        for module in range(before, self.num_modules):
            self.init_module(module, *self.key, module)
        return range(before, self.num_modules)

    def forward_averaged(
        self, weight_BM: Tensor, rows_RD: Tensor, tokens_per_module: int
    ) -> Tensor:
        """Apply B averaged modules, `theta_b = sum over m of weight[b, m] theta_m`, to rows.

        Args:
            weight_BM: float [B, M]: weights of the average.
            rows_RD: rows [R, D], grouped by sequence.
            tokens_per_module: rows per averaged module, R / B.

        Returns:
            Outputs [R, W]. Memory: B copies of one module's parameters.
        """
        assert self.holds_all_modules, "averaging needs all modules on this rank"
        averaged = {
            name: torch.tensordot(weight_BM.to(value.dtype), value, dims=1)
            for name, value in self.named_parameters(recurse=False)
        }
        out: Tensor = functional_call(self, averaged, (rows_RD, tokens_per_module))
        return out


def grouped_product(
    rows_RI: Tensor, weight_eIO: Tensor, tokens_per_module: TokensPerExpert
) -> Tensor:
    """Multiply each row by the matrix of its module; the result [R, O] has the rows' dtype."""
    return grouped_linear(rows_RI, weight_eIO.to(rows_RI.dtype), tokens_per_module)


def vector_per_row(
    vector_eX: Tensor, rows_RD: Tensor, tokens_per_module: TokensPerExpert
) -> Tensor:
    """Return each row's module's vector, [R, X].

    It is a product with ones, so its backward is a product too: deterministic, no atomic scatter.
    """
    return grouped_product(
        rows_RD.new_ones(len(rows_RD), 1), vector_eX.unsqueeze(1), tokens_per_module
    )
