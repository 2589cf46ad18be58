"""Operators that Triton computes in one launch each (`moe.kernels=triton`).

They are registered with torch under their shapes, so that tensors without data (`dmoe plan`, tests
on meta) pass through them without Triton, and count as what they launch. The Triton files beside
this one are imported by the first call with data. The torch forms, which are the default and the
reference, are in `moe/dispatch.py` and `moe/experts/activation.py`.

Letters: T tokens, D width, K experts per token, R rows in expert order, F hidden width, H = 2F for
gated kinds, else F.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, empty_like

from dmoe.config.errors import ConfigError
from dmoe.config.expert_shapes import GATED


def kernels_on(kernels: str, x: Tensor) -> str:
    """Return whose kernels compute on the device of `x`: Triton's on a GPU alone, and on meta."""
    if kernels == "torch" or x.is_cuda or x.is_meta or _is_interpreted():
        return kernels
    return "torch"


def check_kernels(kernels: str, device: torch.device) -> None:
    """Refuse to train with `moe.kernels=triton` where Triton cannot compute.

    Raises:
        ConfigError: the device is no GPU, or no Triton is installed.
    """
    if kernels != "triton":
        return
    if device.type != "cuda":
        other = f"computes on a GPU, and this run trains on {device.type}"
        raise ConfigError("moe.kernels", "triton", other, "use moe.kernels=torch")
    _check_installed()


def _check_installed() -> None:
    if find_spec("triton") is None:
        missing = "needs Triton, which is not installed here"
        raise ConfigError("moe.kernels", "triton", missing, "pip install 'dmoe[kernels]'")


def _is_interpreted() -> bool:
    """Return whether Triton's interpreter computes, on the CPU: in tests (TRITON_INTERPRET=1)."""
    if find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def _computed_by(file: str, name: str) -> Callable[..., Any]:
    """Return a function of a Triton file, which the first call imports."""

    def compute(*given: Any) -> Any:
        _check_installed()
        return getattr(import_module(f"dmoe.moe.kernels.{file}"), name)(*given)

    return compute


def _activated_shape(kind: str, hidden_RH: Tensor) -> Tensor:
    rows, width = hidden_RH.shape
    return hidden_RH.new_empty(rows, width // 2 if kind in GATED else width)


OPERATORS: tuple[tuple[str, Callable[..., Any], Callable[..., Any]], ...] = (
    (
        "gather_rows(Tensor x_TD, Tensor token_R, Tensor? filled_R) -> Tensor",
        _computed_by("triton_rows", "gather_rows"),
        lambda x_TD, token_R, filled_R: x_TD.new_empty(len(token_R), x_TD.shape[1]),
    ),
    (
        "sum_rows(Tensor rows_RD, Tensor row_TK, Tensor? weight_TK, Tensor? keep_TK) -> Tensor",
        _computed_by("triton_rows", "sum_rows"),
        lambda rows_RD, row_TK, *_: rows_RD.new_empty(len(row_TK), rows_RD.shape[1]),
    ),
    (
        "sum_rows_backward(Tensor grad_TD, Tensor rows_RD, Tensor weight_TK, Tensor assignment_R,"
        " Tensor? filled_R) -> (Tensor, Tensor)",
        _computed_by("triton_rows", "sum_rows_backward"),
        lambda _, rows_RD, weight_TK, *__: (empty_like(rows_RD), empty_like(weight_TK)),
    ),
    (
        "activate(str kind, Tensor hidden_RH) -> Tensor",
        _computed_by("triton_activation", "activate"),
        _activated_shape,
    ),
    (
        "activate_backward(str kind, Tensor hidden_RH, Tensor grad_RF) -> (Tensor, Tensor)",
        _computed_by("triton_activation", "activate_backward"),
        lambda _, hidden_RH, grad_RF: (empty_like(grad_RF), empty_like(hidden_RH)),
    ),
)
"""Name, arguments and results; what computes it; what returns its shapes only."""

_LIBRARY = torch.library.Library("dmoe", "DEF")
for _schema, _compute, _shape in OPERATORS:
    _name = _LIBRARY.define(_schema)
    # the CPU is for Triton's interpreter: tests compare the kernels with the torch forms there
    for _key, _function in (("CUDA", _compute), ("CPU", _compute), ("Meta", _shape)):
        _LIBRARY.impl(_name, _function, _key)

gather_rows: Callable[..., Tensor] = torch.ops.dmoe.gather_rows
sum_rows: Callable[..., Tensor] = torch.ops.dmoe.sum_rows
sum_rows_backward: Callable[..., tuple[Tensor, Tensor]] = torch.ops.dmoe.sum_rows_backward
activate: Callable[..., Tensor] = torch.ops.dmoe.activate
activate_backward: Callable[..., tuple[Tensor, Tensor]] = torch.ops.dmoe.activate_backward
