#!/bin/bash
# Several machines without a scheduler: run this on each of them, with its number (0, 1, ...), how many there are, and the first's name.
#   bash recipes/launch/torchrun.sh 0 2 node-1
set -euo pipefail
torchrun --nnodes "$2" --node_rank "$1" --nproc_per_node 8 --master_addr "$3" --master_port 29500 \
    train.py recipes/qwen2_5_vl_7b/sft/vision_centric.yaml --deepspeed ds_configs/zero2.json --resume
