#!/usr/bin/env bash
# Start the same training with `accelerate launch`.
#
#     DEVICE=cpu RANKS=2 launch/accelerate.sh configs/quickstart.yaml [k=v ...]
#
# DEVICE  cpu or gpu: picks accelerate_cpu.yaml or accelerate_gpu.yaml beside this script
# RANKS   processes on this machine
#
# dmoe initialises the process group itself, before it builds its Accelerator, and takes precision,
# device and accumulation from its own config: of accelerate's file only the number of processes is
# used. Several machines: launch/multi_node.sh.
set -euo pipefail

refuse() { echo "accelerate.sh: $1" >&2; exit 2; }
# --dry-run, first of all arguments: print the command instead.
dry=0
[[ "${1:-}" != --dry-run ]] || { dry=1; shift; }
start() { if ((dry)); then echo "OMP_NUM_THREADS=${OMP_NUM_THREADS:-} $(printf '%q ' "$@")"; else exec "$@"; fi; }

[[ "${DEVICE:-}" == cpu || "${DEVICE:-}" == gpu ]] || refuse "DEVICE='${DEVICE:-}' is unknown; set DEVICE=cpu or DEVICE=gpu."
[[ "${RANKS:-}" =~ ^[1-9][0-9]*$ ]] || refuse "RANKS='${RANKS:-}' is not a number of processes; set it, for example RANKS=2."
[[ $# -ge 1 ]] || refuse "CONFIG is missing; give a file as the first argument, for example configs/quickstart.yaml."
[[ -r "$1" ]] || refuse "CONFIG '$1' cannot be read; give a YAML file, for example configs/quickstart.yaml."
command -v accelerate >/dev/null || refuse "accelerate is not on PATH; activate the environment dmoe is installed in."
config=$1
shift

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cores=$(nproc) # of this process: a cpuset or a job may give it fewer than the machine has
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > RANKS ? cores / RANKS : 1))}"
device=$([[ "$DEVICE" == cpu ]] && echo cpu || echo cuda)

start accelerate launch --config_file "$here/accelerate_$DEVICE.yaml" --num_processes "$RANKS" \
  -m dmoe train "$config" "train.device=$device" "$@"
