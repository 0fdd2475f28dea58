#!/bin/bash
# sbatch recipes/launch/slurm.sh recipes/qwen2_5_vl_7b/sft/vision_centric.yaml
#SBATCH --job-name=evensight
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"      # the repository's root, on a disk that all machines share
export OMP_NUM_THREADS=8
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# --resume begins the run where there is none, so that a job that was stopped and queued again continues.
srun .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc_per_node 8 \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:29500" \
    train.py "${1:-recipes/qwen2_5_vl_7b/sft/vision_centric.yaml}" --deepspeed ds_configs/zero2.json --resume
