#!/bin/bash
#SBATCH --job-name=dalr
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.out
#
# sbatch slurm/train_8node.sh [--config RECIPE] [--section.key=value ...]
#
# Trains on all GPUs of 8 nodes. Every argument goes to dalr_scale.train; the variables are listed
# at the top of slurm/common.sh, where the call of `accelerate launch` is, too. --exclusive hands
# over the nodes with all cores and GPUs they have; where a site wants them counted:
#   sbatch --gpus-per-node=8 --cpus-per-task=64 slurm/train_8node.sh
set -euo pipefail
CHECKOUT=${CHECKOUT:-${SLURM_SUBMIT_DIR:?submit this script with sbatch}}
source "$CHECKOUT/slurm/common.sh"
train "$@"
