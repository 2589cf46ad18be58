"""What every bank of modules is: M modules as stacked parameters [M, ...], computed over rows that are grouped by module.

A module on a frozen network is the mixture layer once more: the frozen part is the shared expert, the modules are the experts. So a
bank keeps the contract of `dmoe.moe.experts.MLPExperts`: `forward(rows, tokens_per_module)`, `shard`, `num_experts`, `first`, and a draw keyed
by the global id. It goes through the same dispatchers and is sharded by the same `shard_experts`.

Letters: M modules of the bank, e modules here (M/EP), R rows, D width read, W width of a module's contribution, B sequences.

`rows @ weight[module of the row]` for the narrow matrices that modules are made of: ranks, bottlenecks, single columns.

CUDA's grouped GEMM wants every row of a matrix to start at a multiple of 16 bytes. Experts are that wide anyway; a rank of 4 or a
column of ones is not, so there both widths are filled up with zeros to a multiple of 8, which changes no number. The CPU takes any
width.

Letters: R rows, I input width, O output width, e modules here.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dmoe.config.errors import ConfigError
from dmoe.moe.dispatch import TokensPerExpert
from dmoe.moe.experts.grouped_mlp import grouped_linear

Composition = Literal["parameter", "input", "function"]
"""How a module changes the network it is attached to (Pfeiffer et al. 2023, section 3)."""
InputKind = Literal["input", "output", "sequence"]
"""A module's row: the frozen module's input, its output, or nothing but a one for each sequence."""


class AdapterBank(nn.Module):
    """M modules. Every parameter and every buffer is stacked on dimension 0, which is what shards and grows.

    `in_dim` and `out_dim` are the widths of the frozen module; the contribution of a module has width `width`. A fresh bank has the
    draws of seed 0 and layer 0; `initialize` draws anew.
    """

    composition: Composition
    input_kind: InputKind
    width: int
    """W: of what one module returns for one row."""
    num_prefix_tokens = 0
    """Positions at the front of a sequence that the modules write and the router must not see."""

    def __init__(self, num_modules: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        if num_modules < 1:
            raise ConfigError("modules", num_modules, "must be at least 1", "use 1 or more")
        self.num_experts, self.first = num_modules, 0
        self.in_dim, self.out_dim, self.width = in_dim, out_dim, out_dim
        self.key = (0, 0)

    @property
    def num_modules(self) -> int:
        """M, over all ranks; the dispatchers call it `num_experts`."""
        return self.num_experts

    @property
    def row_dim(self) -> int:
        """D: the width of the rows a module reads."""
        return {"input": self.in_dim, "output": self.out_dim, "sequence": 1}[self.input_kind]

    def forward(self, rows_RD: Tensor, tokens_per_module: TokensPerExpert) -> Tensor:
        """[R, D] grouped by module -> [R, W]: each row's contribution. A module without rows gets a zero gradient."""
        raise NotImplementedError

    def reference(self, row_D: Tensor, module: int) -> Tensor:
        """[W]: the formula of one row and the module with this local index. For tests, and for who reads."""
        raise NotImplementedError

    def init_module(self, local: int, seed: int, layer: int, module: int) -> None:
        """Fill module `local` of this rank with the weights of (seed, layer, global id `module`)."""
        raise NotImplementedError

    def add_to_output(self, y: Tensor, contribution: Tensor) -> Tensor:
        """The frozen module's output [..., S, out_dim] and what the modules add to it, [T, W]."""
        return y + contribution.view(y.shape)

    def bind(self, frozen: nn.Module) -> None:
        """Look at the frozen module before the first draw; few banks need it."""

    def weight_delta(self, local: int) -> Tensor:
        """[in_dim, out_dim]: what one module adds to a frozen matrix, as in `x @ matrix`. Raises ConfigError where it is not one."""
        raise ConfigError(
            "modules",
            type(self).__name__,
            "adds no matrix",
            "merge LowRank or SparseDelta, or average the modules",
        )

    def forward_reference(self, rows_RD: Tensor, tokens_per_module: Tensor) -> Tensor:
        """`forward`, one row at a time. For tests."""
        module_R = torch.arange(len(tokens_per_module)).repeat_interleave(tokens_per_module).tolist()
        rows = [self.reference(row_D, module) for row_D, module in zip(rows_RD, module_R, strict=True)]
        return torch.stack(rows) if rows else rows_RD.new_zeros(0, self.width)

    def initialize(self, seed: int, layer: int) -> None:
        """Draw every module from a generator of its own: the same weights at any EP size, and whatever M is."""
        self.key = (seed, layer)
        for local in range(self.local_modules):
            self.init_module(local, seed, layer, self.first + local)

    @property
    def local_modules(self) -> int:
        """e: the modules this rank holds."""
        return len(next(self.parameters()))

    @property
    def holds_all_modules(self) -> bool:
        return self.local_modules == self.num_modules

    def stacked_tensors(self) -> dict[str, Tensor]:
        """Every stacked tensor by name: parameters and buffers."""
        return {
            **dict(self.named_parameters(recurse=False)),
            **dict(self.named_buffers(recurse=False)),
        }

    def replace_tensors(self, stacks: dict[str, Tensor]) -> None:
        """Take these tensors, parameters as new parameters. An optimizer made before does not know them."""
        for name, value in stacks.items():
            if name in self._parameters:
                setattr(
                    self,
                    name,
                    nn.Parameter(value, requires_grad=self.get_parameter(name).requires_grad),
                )
            else:
                setattr(self, name, value)

    def shard(self, first: int, count: int) -> None:
        """Keep only the global modules `first .. first+count-1`."""
        self.first = first
        self.replace_tensors(
            {
                name: value.detach()[first : first + count].clone()
                for name, value in self.stacked_tensors().items()
            }
        )

    def add_modules(self, count: int = 1) -> range:
        """Add `count` fresh modules behind the others, which keep their bits. Returns the new ids. Before sharding."""
        assert self.holds_all_modules, "a bank grows before it is sharded"
        before = self.num_modules
        self.replace_tensors(
            {
                name: torch.cat(
                    [value.detach(), value.detach()[:1].expand(count, *value.shape[1:])]
                )
                for name, value in self.stacked_tensors().items()
            }
        )
        self.num_experts = before + count
        for module in range(before, self.num_modules):
            self.init_module(module, *self.key, module)
        return range(before, self.num_modules)

    def forward_averaged(self, weight_BM: Tensor, rows_RD: Tensor, tokens_per_module: int) -> Tensor:
        """`forward` with B mixtures of the parameters, `theta_b = sum over m of weight[b, m] theta_m`, in place of the M modules.

        Cost: B sets of parameters are written out, whatever the rows are.
        """
        assert self.holds_all_modules, "parameters can be averaged only where all modules are"
        mixed = {
            name: torch.tensordot(weight_BM.to(value.dtype), value, dims=1)
            for name, value in self.named_parameters(recurse=False)
        }
        out: Tensor = functional_call(self, mixed, (rows_RD, tokens_per_module))
        return out


WIDTH_MULTIPLE = 8


def grouped_product(rows_RI: Tensor, weight_eIO: Tensor, tokens_per_module: TokensPerExpert) -> Tensor:
    """[R, O], in the rows' dtype."""
    weight_eIO = weight_eIO.to(rows_RI.dtype)
    function = padded_grouped_product if rows_RI.is_cuda else grouped_linear
    return function(rows_RI, weight_eIO, tokens_per_module)


def padded_grouped_product(rows_RI: Tensor, weight_eIO: Tensor, tokens_per_module: TokensPerExpert) -> Tensor:
    """The same, through matrices whose widths are multiples of 8. Costs a copy of what is not."""
    more_in, more_out = (-size % WIDTH_MULTIPLE for size in weight_eIO.shape[1:])
    if not more_in and not more_out:
        return grouped_linear(rows_RI, weight_eIO, tokens_per_module)
    wide_RO = grouped_linear(
        F.pad(rows_RI, (0, more_in)), F.pad(weight_eIO, (0, more_out, 0, more_in)), tokens_per_module
    )
    return wide_RO[:, : weight_eIO.shape[2]]


def vector_per_row(stack_eX: Tensor, rows_RD: Tensor, tokens_per_module: TokensPerExpert) -> Tensor:
    """[R, X]: each row's module's vector. As a product with a one, so that its backward is a product too and no atomic scatter."""
    return grouped_product(rows_RD.new_ones(len(rows_RD), 1), stack_eX.unsqueeze(1), tokens_per_module)
