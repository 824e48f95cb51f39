#!/usr/bin/env bash
#SBATCH --job-name=sgt-any
#SBATCH --ntasks-per-node=1
#SBATCH --time=2-00:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
#SBATCH --output=%x-%j.log
# A config of your own: sbatch launch/any.sh mine.yaml [--section.key value ...]. Nodes and GPUs are the config's (cluster.nodes,
# cluster.gpus_per_node) unless sbatch was given a number of nodes above 1 or any GPUs.
case "${1:-}" in
  '' | -h | --help) echo "sbatch --nodes=2 launch/any.sh NAME|FILE.yaml [--section.key value ...]; without --nodes and GPUs: the config's"; exit 0 ;;
  -*) echo "error: the first word must be a config's name or file, not $1" >&2; exit 2 ;;
esac
CONFIG=$1
[ ! -f "$CONFIG" ] || CONFIG=$(realpath "$CONFIG")
shift
LAUNCH="launch/any.sh $CONFIG"
SIZED_BY_CONFIG=1
home=${SGT_TITAN_HOME:-$(dirname "$0")/..} # sbatch runs a copy of this script; the job's record says where it lies
[ -n "${SGT_TITAN_HOME:-}" ] || [ -f "$home/slurm/run.sh" ] ||
  home=$(dirname "$(scontrol show job "$SLURM_JOB_ID" -o | sed 's/.* Command=\([^ ]*\).*/\1/')")/..
[ -f "$home/slurm/run.sh" ] || { echo "error: no slurm/run.sh in $home; set SGT_TITAN_HOME to the checkout" >&2; exit 2; }
. "$home/slurm/run.sh"
