#!/usr/bin/env bash
#SBATCH --job-name=sgt-llama70b
#SBATCH --nodes=64
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=2-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
#SBATCH --output=%x-%j.log
CONFIG=llama3_70b_64x8
LAUNCH=launch/llama70b.sh
. "${SGT_TITAN_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}/slurm/run.sh"
