#!/usr/bin/env bash
#SBATCH --job-name=sgt-llama1b
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=2-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
#SBATCH --output=%x-%j.log
CONFIG=llama3_1b
LAUNCH=launch/llama1b.sh
. "${SGT_TITAN_HOME:-${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}}/slurm/run.sh"
