"""RMSNorm under autocast."""

import torch

from dmoe.models.layers import RMSNorm


def test_the_sum_of_squares_stays_wide_under_autocast() -> None:
    """`vecdot` is on autocast's list: every norm of a bf16 run on the CPU was rounded to 8 bits, the router's input with it."""
    norm, x = RMSNorm(64, 1e-5), torch.randn(4, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = norm(x)
    torch.testing.assert_close(inside, norm(x), rtol=1e-6, atol=1e-6)
