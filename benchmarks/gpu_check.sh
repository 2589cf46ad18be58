#!/usr/bin/env bash
# Check what one GPU can show of dmoe; see benchmarks/gpu_check/__init__.py and docs/gpu.md.
#
#     benchmarks/gpu_check.sh first|second [--json FILE]   # on a machine with a GPU, each under four minutes
#     benchmarks/gpu_check.sh all --dry-run                # what a CPU can run of both
#
# PYTHON      the interpreter (python3)
# PYTHONPATH  folders with packages that it lacks, for example omegaconf, wandb and plotly
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.gpu_check "$@"
