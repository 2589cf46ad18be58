"""Which floating point type the matrix products run in."""

from __future__ import annotations

import torch

from dmoe.config.errors import ConfigError

__all__ = ["resolve"]

NARROWEST_BF16_ON_CPU = 512
"""Below this width bf16 loses on a CPU: oneDNN compiles a kernel for every new number of rows, and an expert's rows are never the same
twice. Measured on one thread with AMX, a quickstart step at width 128: fp32 122 ms, bf16 264; at 512: fp32 925 ms, bf16 654."""


def resolve(precision: str, device: torch.device, dim: int) -> str:
    """`auto | fp32 | bf16 | fp16` -> `fp32 | bf16 | fp16`; parameters and optimizer state stay float32 in all of them.

    auto is bf16 where the hardware multiplies it natively (CUDA from Ampere on, CPUs with amx_bf16 or avx512_bf16) and where
    that pays, which on a CPU takes a model width `dim` of 512.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "train.precision", precision, "fp16 needs a GPU (accelerate has no fp16 loss scaling on CPU)", "use bf16 or auto"
        )
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if dim < NARROWEST_BF16_ON_CPU:
        return "fp32"
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "fp32"
