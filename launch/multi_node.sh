#!/usr/bin/env bash
# Start a run on several machines: call this on each, with the same values except NODE_RANK.
#
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 RANKS_PER_NODE=8 RUN_DIR=/shared/run1 \
#         launch/multi_node.sh CONFIG [k=v ...]
#
# NNODES          number of machines
# NODE_RANK       0 on the machine named by MASTER_ADDR, 1, 2, ... on the others
# MASTER_ADDR     name or address of machine 0, as the others reach it
# RANKS_PER_NODE  processes per machine: its GPUs, or a share of its cores
# RUN_DIR         run directory on a file system of all machines; a restart resumes from its last
#                 checkpoint
# Optional: MASTER_PORT (29500), MAX_RESTARTS (3), JOB_ID (dmoe; the same on all machines of a job),
# LOCAL_ADDR (the address under which the others reach this machine, where its host name is not).
#
# Ports: MASTER_PORT on machine 0 and, for gloo and NCCL, any free port between the machines.
set -euo pipefail

refuse() { echo "multi_node.sh: $1" >&2; exit 2; }
# --dry-run, first of all arguments: print the command instead.
dry=0
[[ "${1:-}" != --dry-run ]] || { dry=1; shift; }
start() { if ((dry)); then echo "OMP_NUM_THREADS=${OMP_NUM_THREADS:-} $(printf '%q ' "$@")"; else exec "$@"; fi; }
number='^[0-9]+$'

[[ "${NNODES:-}" =~ ^[1-9][0-9]*$ ]] ||
  refuse "NNODES='${NNODES:-}' is not a number of machines; set it, for example NNODES=2."
[[ "${NODE_RANK:-}" =~ $number && "${NODE_RANK:-}" -lt "$NNODES" ]] ||
  refuse "NODE_RANK='${NODE_RANK:-}' is not this machine's number; set it to 0 ... $((NNODES - 1)), 0 on MASTER_ADDR."
[[ -n "${MASTER_ADDR:-}" ]] || refuse "MASTER_ADDR is not set; set it to the name or address of machine 0, the same on all machines."
[[ "${RANKS_PER_NODE:-}" =~ ^[1-9][0-9]*$ ]] ||
  refuse "RANKS_PER_NODE='${RANKS_PER_NODE:-}' is not a number of processes; set it to the GPUs of one machine."
[[ -n "${RUN_DIR:-}" ]] ||
  refuse "RUN_DIR is not set; set it to a directory all machines see, so that a restart finds the checkpoints."
[[ "${MASTER_PORT:=29500}" =~ $number ]] ||
  refuse "MASTER_PORT='$MASTER_PORT' is not a port; set it to a free one, or leave it out for 29500."
[[ "${MAX_RESTARTS:=3}" =~ $number ]] || refuse "MAX_RESTARTS='$MAX_RESTARTS' is not a number; set it, or leave it out for 3."
[[ $# -ge 1 ]] || refuse "CONFIG is missing; give a file as the first argument, for example configs/multi_gpu.yaml."
[[ -r "$1" ]] || refuse "CONFIG '$1' cannot be read on this machine; give a YAML file that every machine has."
command -v torchrun >/dev/null || refuse "torchrun is not on PATH; activate the environment dmoe is installed in."
config=$1
shift

# After a rank died, torch 2.13 cannot rebuild gloo from the agents' shared store; use one store per
# attempt.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
# Seconds that torchrun waits after it forwarded SIGTERM, before it kills: to write a checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"
cores=$(nproc) # of this process: a cpuset or a job may give it fewer than the machine has
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > RANKS_PER_NODE ? cores / RANKS_PER_NODE : 1))}"

# Set the rendezvous host: detection by host name fails in containers and behind aliases.
is_host=$([[ "$NODE_RANK" -eq 0 ]] && echo true || echo false)

start torchrun --nnodes "$NNODES" --nproc-per-node "$RANKS_PER_NODE" --max-restarts "$MAX_RESTARTS" \
  --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "${JOB_ID:-dmoe}" --rdzv-conf "is_host=$is_host" \
  ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
  -m dmoe train "$config" "train.run_dir=$RUN_DIR" "$@"
