#!/bin/bash
#SBATCH --job-name=dalr-features
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.out
#
# sbatch slurm/features.sh SHARDS --name SET --image-teacher DIRECTORY
#
# Stores teacher features beside the shards with one process for each GPU; every argument goes to
# `dalr-scale features`. More nodes: sbatch --nodes=4 slurm/features.sh ...
set -euo pipefail
CHECKOUT=${CHECKOUT:-${SLURM_SUBMIT_DIR:?submit this script with sbatch}}
source "$CHECKOUT/slurm/common.sh"
store_features "$@"
