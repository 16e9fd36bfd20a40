#!/bin/bash
#SBATCH --job-name=dalr1
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.out
#
# sbatch slurm/train_1node.sh [--config RECIPE] [--section.key=value ...]
#
# Trains on all GPUs of one node; otherwise as train_8node.sh.
set -euo pipefail
CHECKOUT=${CHECKOUT:-${SLURM_SUBMIT_DIR:?submit this script with sbatch}}
source "$CHECKOUT/slurm/common.sh"
train "$@"
