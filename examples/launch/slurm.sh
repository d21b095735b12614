#!/usr/bin/env bash
#SBATCH --job-name=tedcompile
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#
#     sbatch slurm.sh MODEL DATA RUN        # three folders that all nodes see
#
# Slurm starts one torchrun on each node. Five minutes before the end of the time, SIGTERM goes to the steps: the ranks
# save after the step that they are in. Queued again, the job goes on from there, on another number of nodes too
# (sbatch --nodes 4, with --mesh dp=4,ep=4,tp=2).
set -euo pipefail
model=$1 data=$2 run=$3
export OMP_NUM_THREADS=1 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" --max-restarts 3 --no-python \
    tedcompile train --model "$model" --data "$data" --out "$run" --export "$run/trained" --mesh dp=2,ep=4,tp=2 \
    --batch 1 --seq 4096 --micro-batches 64 --steps 2000 --lr 1e-5 --warmup 100 --save-every 100 --timeout 300
