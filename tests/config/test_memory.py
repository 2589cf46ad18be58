"""Memory that runs out is one sentence: what was needed, what there is, which field to lower."""

from __future__ import annotations

import errno
import re

import numpy as np
import pytest
import torch

from dmoe.config.errors import ConfigError, OutOfMemoryError
from dmoe.config.launch_env import main_memory
from dmoe.config.rules.memory import (
    check_memory,
    describe_out_of_memory,
    explain_out_of_memory,
    field_to_lower,
    is_out_of_memory,
    least_activations,
)
from dmoe.models.transformer import Transformer
from tests.tiny import VOCAB, tiny

CUDA = torch.cuda.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 3 has a total capacity of 79.10 GiB of "
    "which 512.00 MiB is free. Including non-PyTorch memory, this process has 78.60 GiB in use."
)


def raised(make: object) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        make()  # type: ignore[operator]
    return caught.value


def test_a_gpus_error_says_what_was_needed_and_what_there_is() -> None:
    assert describe_out_of_memory(CUDA) == (
        "out of memory: 2.00 GiB more were needed, and GPU 3 has 512.00 MiB free of 79.10 GiB"
    )


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: torch.empty(1 << 50, dtype=torch.uint8), id="torch"),
        pytest.param(lambda: np.empty(1 << 50, dtype=np.uint8), id="numpy"),
    ],
)
def test_real_allocations_that_fail(make: object) -> None:
    """A raw traceback of alloc_cpu.cpp, with the number of bytes in its middle."""
    error = raised(make)
    assert is_out_of_memory(error)
    text = describe_out_of_memory(error)
    assert re.search(r"out of memory: 1(,048,576 GiB|\.00 PiB) more were needed", text)
    assert f"of {main_memory() / 2**30:,.0f} GiB of main memory" in text


@pytest.mark.parametrize(
    "error",
    [
        CUDA,
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory"),
    ],
    ids=lambda error: str(error)[:20],
)
def test_every_allocator_is_known(error: Exception) -> None:
    """Also where another error was raised from it."""
    outer = ValueError("while copying")
    outer.__cause__ = error
    assert is_out_of_memory(error)
    assert is_out_of_memory(outer)
    assert describe_out_of_memory(error).startswith("out of memory")
    assert "\n" not in describe_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shape mismatch"),
        ValueError("out of memory"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=str,
)
def test_other_errors_are_left_alone(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, explain_out_of_memory(tiny(), 1, "batch"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("stage", "overrides", "field", "fix"),
    [
        ("batch", [], "train.global_batch=8", "use train.micro_batch=4 or less"),
        ("batch", ["train.micro_batch=4"], "train.micro_batch=4", "use train.micro_batch=2 or"),
        ("batch", ["train.micro_batch=1"], "train.recompute=none", "use train.recompute=block"),
        (
            "batch",
            ["train.micro_batch=1", "train.recompute=true"],
            "data.seq_len=16",
            "use a lower one, or lower model.dim",
        ),
        ("model", ["moe.expert_dim=2048"], "moe.num_experts=8", "lower it, or divide the model"),
        ("model", ["model.moe_every=0"], "model.dim=32", "lower it, or divide the model"),
        ("data", [], "data.source=synthetic:zipf", "use less text, or shards of it"),
    ],
)
def test_the_field_to_lower_depends_on_what_was_being_done(
    stage: object, overrides: list[str], field: str, fix: str
) -> None:
    with (
        pytest.raises(OutOfMemoryError) as caught,
        explain_out_of_memory(tiny(*overrides), 1, stage),  # type: ignore[arg-type]
    ):
        raise CUDA
    assert str(caught.value).startswith(f"{field}: out of memory: 2.00 GiB more were needed, and ")
    assert fix in str(caught.value)
    assert caught.value.exit_code == 2
    assert caught.value.every_rank, "another rank may have had enough"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_suggested_micro_batch_can_be_used(world: int) -> None:
    config = tiny("train.global_batch=24")
    *_, fix = field_to_lower(config, world, "batch")
    smaller = tiny("train.global_batch=24", f"train.{fix.split('train.')[1].split()[0]}")
    assert field_to_lower(smaller, world, "batch")[0] == "train.micro_batch"


def test_a_batch_that_cannot_fit_is_refused_before_torch_starts() -> None:
    """`train.global_batch=1000000` ran for 45 seconds and ended in a traceback."""
    gib = 1 << 30
    for value in ("train.global_batch=1000000", "train.micro_batch=1000000"):
        overrides = {"train.global_batch=1000000", value}
        with pytest.raises(ConfigError) as refused:
            check_memory(tiny(*overrides), 1, 1, 24 * gib)
        assert str(refused.value).startswith(f"{value}: one forward of 1,000,000 sequences per ")
        assert " on this machine of 24 GiB; use train.micro_batch=" in str(refused.value)
        fixed = str(refused.value).split("use ")[1].removesuffix(" or less")
        check_memory(tiny("train.global_batch=1000000", fixed), 1, 1, 24 * gib)
    check_memory(tiny("train.global_batch=1000448"), 1024, 1, 24 * gib)


@pytest.mark.parametrize("more", [[], ["train.recompute=true"], ["train.precision=bf16"]])
def test_the_bound_of_activations_is_below_what_backward_keeps(more: list[str]) -> None:
    """So nothing that works is refused. Measured: storages that autograd saves, each once, when
    the backward begins."""
    config = tiny("model.layers=3", "data.seq_len=64", *more)
    recompute = config.train.recompute
    model = Transformer(config.model, config.moe, VOCAB, recompute=recompute)
    model.initialize(0)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    token_BS = torch.randint(0, VOCAB, (4, 64))
    autocast = torch.autocast("cpu", torch.bfloat16, config.train.precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        output = model(token_BS, token_BS)
    assert output.loss_sum is not None
    kept = sum(t.untyped_storage().nbytes() for p, t in saved.items() if p not in parameters)
    assert 0.15 * kept < 4 * least_activations(config) <= kept
