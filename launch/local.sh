#!/usr/bin/env bash
# Start N ranks on this machine with torchrun: gloo on CPU, NCCL with one GPU per rank.
#
#     RANKS=2 launch/local.sh configs/quickstart.yaml [moe.top_k=1 ...]
#
# `dmoe train --ranks 2 CONFIG` does the same; use this script to add torchrun's own options.
set -euo pipefail

refuse() { echo "local.sh: $1" >&2; exit 2; }
# --dry-run, first of all arguments: print the command instead.
dry=0
[[ "${1:-}" != --dry-run ]] || { dry=1; shift; }
start() { if ((dry)); then echo "OMP_NUM_THREADS=${OMP_NUM_THREADS:-} $(printf '%q ' "$@")"; else exec "$@"; fi; }

[[ "${RANKS:-}" =~ ^[1-9][0-9]*$ ]] ||
  refuse "RANKS='${RANKS:-}' is not a number of processes; set it, for example RANKS=2 launch/local.sh CONFIG."
[[ $# -ge 1 ]] || refuse "CONFIG is missing; give a file as the first argument, for example configs/quickstart.yaml."
[[ -r "$1" ]] || refuse "CONFIG '$1' cannot be read; give a YAML file, for example configs/quickstart.yaml."
command -v torchrun >/dev/null || refuse "torchrun is not on PATH; activate the environment dmoe is installed in."

# torchrun's default is one thread per rank; divide the cores instead.
cores=$(nproc) # of this process: a cpuset or a job may give it fewer than the machine has
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > RANKS ? cores / RANKS : 1))}"

start torchrun --standalone --nproc-per-node "$RANKS" -m dmoe train "$@"
