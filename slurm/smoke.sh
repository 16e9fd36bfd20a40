#!/bin/bash
#SBATCH --job-name=dalr-smoke
#SBATCH --nodes=2
#SBATCH --time=00:20:00
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x_%j.out
#
# sbatch slurm/smoke.sh [--section.key=value ...]
#
# A complete run in miniature on two nodes, checks included: try it before a long job.
set -euo pipefail
CHECKOUT=${CHECKOUT:-${SLURM_SUBMIT_DIR:?submit this script with sbatch}}
source "$CHECKOUT/slurm/common.sh"
train --config smoke "$@"
