"""What one GPU can show of dmoe: a line per check, and all of them as one JSON.

    benchmarks/gpu_check.sh first           # correctness: start, layers, kernels, determinism
    benchmarks/gpu_check.sh second          # runs: verify, resuming, fp16, two ranks, memory, speed
    benchmarks/gpu_check.sh all --dry-run   # what a CPU can run of both, smaller

A half takes less than four minutes: after `DEADLINE` the rest is not started, and its lines say so.
Exit code 0: nothing failed. Works from a checkout without an installation, with torch 2.11, and
with omegaconf, wandb and plotly from a folder in PYTHONPATH.
"""

import os

# Before CUDA starts: `train.deterministic` asks for it too.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
