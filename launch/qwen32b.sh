#!/usr/bin/env bash
#SBATCH --job-name=sgt-qwen32b
#SBATCH --nodes=64
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=2-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
#SBATCH --output=%x-%j.log
CONFIG=qwen3_32b_64x8
LAUNCH=launch/qwen32b.sh
home=${SGT_TITAN_HOME:-$(dirname "$0")/..} # sbatch runs a copy of this script; the job's record says where it lies
[ -n "${SGT_TITAN_HOME:-}" ] || [ -f "$home/slurm/run.sh" ] ||
  home=$(dirname "$(scontrol show job "$SLURM_JOB_ID" -o | sed 's/.* Command=\([^ ]*\).*/\1/')")/..
[ -f "$home/slurm/run.sh" ] || { echo "error: no slurm/run.sh in $home; set SGT_TITAN_HOME to the checkout" >&2; exit 2; }
. "$home/slurm/run.sh"
