"""Triton's kernels against the torch forms, in Triton's interpreter, and compiled for three GPUs.

The interpreter runs each program of a kernel with NumPy: the same sums and masks, no GPU. Compiling
needs no GPU either, because Triton's wheel holds NVIDIA's assembler: what cannot be built for a
card is found here. Neither says anything about speed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="pip install 'dmoe[kernels]' has Triton")
pytestmark = pytest.mark.slow

CAPABILITIES = (80, 90, 100)  # A100, H100, B200


def test_they_equal_the_torch_forms() -> None:
    file = Path(__file__).with_name("interpreted_kernels.py")
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(file)]
    more = {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, env=os.environ | more, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def compiled(name: str) -> ModuleType:
    """A second copy of a file of kernels, made for a GPU."""
    found = importlib.util.find_spec(f"dmoe.moe.kernels.{name}")
    assert found is not None
    spec = importlib.util.spec_from_file_location(f"compiled_{name}", found.origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(function: Any, capability: int, types: dict[str, str], **constants: Any) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    assert {*types, *constants} == set(names)
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=values)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert made.asm["cubin"], "machine code"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_for(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows, activation = compiled("triton_rows"), compiled("triton_activation")
    row, index, flag, size = "*bf16", "*i64", "*i1", "i32"
    float32 = {"ACCUMULATE": triton.language.float32, "BLOCK": 1024}
    build(
        rows._gather,
        capability,
        {"x": row, "token": index, "filled": flag, "out": row, "width": size},
        HAS_FILLED=True,
        BLOCK=1024,
    )
    types = {"rows": row, "row_of": index, "weight": "*fp32", "keep": flag, "out": row}
    flags = {"HAS_WEIGHT": True, "HAS_KEEP": True, "TOP_K": 8}
    build(rows._sum, capability, types | {"width": size}, **flags, **float32)
    types = dict.fromkeys(("grad", "rows", "grad_rows"), row) | {"assignment_of": index}
    types |= {"filled": flag, "weight": "*fp32", "grad_weight": "*fp32", "width": size}
    build(rows._sum_backward, capability, types, TOP_K=8, HAS_FILLED=True, **float32)
    for curve in sorted(set(activation.CURVES.values())):
        kind = {"CURVE": curve, "IS_GATED": curve != "relu"}
        types = {"hidden": row, "out": row, "width": size}
        build(activation._activate, capability, types, **kind, **float32)
        types = {"hidden": row, "grad": row, "activated": row, "grad_hidden": row, "width": size}
        build(activation._activate_backward, capability, types, **kind, **float32)
