#!/usr/bin/env bash
# Two nodes of 8 GPUs without a scheduler: run this on each of them, HEAD naming the first one.
#
#     HEAD=node0 bash torchrun.sh MODEL DATA RUN        # three folders that both nodes see
#
# tp stays inside a node when its size divides the GPUs of one: ranks are numbered dp, ep, tp from the outermost.
set -euo pipefail
model=$1 data=$2 run=$3
export OMP_NUM_THREADS=1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or a restart meets the addresses of dead processes (pytorch issue 135712)

exec torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "${HEAD:?the first node}:29500" \
    --rdzv-id "$(basename "$run")" --max-restarts 3 --no-python \
    tedcompile train --model "$model" --data "$data" --out "$run" --export "$run/trained" --mesh dp=2,ep=4,tp=2 \
    --batch 1 --seq 4096 --micro-batches 64 --steps 2000 --lr 1e-5 --warmup 100 --save-every 100 --timeout 300
