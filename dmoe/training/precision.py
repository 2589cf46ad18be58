"""Which floating point type the matrix products run in."""

from __future__ import annotations

import torch

from dmoe.config.errors import ConfigError

__all__ = ["resolve"]


def resolve(precision: str, device: torch.device) -> str:
    """`auto | fp32 | bf16 | fp16` -> `fp32 | bf16 | fp16`; parameters and optimizer state stay float32 in all of them.

    auto is bf16 where the hardware multiplies it natively: CUDA from Ampere on, CPUs with amx_bf16 or avx512_bf16.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "train.precision", precision, "fp16 needs a GPU (accelerate has no fp16 loss scaling on CPU)", "use bf16 or auto"
        )
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "fp32"
