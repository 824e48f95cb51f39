#!/usr/bin/env bash
# Any config on this machine alone: launch/local.sh NAME [--section.key value ...]. As many processes as it has GPUs.
set -euo pipefail
case "${1:-}" in '' | -h | --help) sed -n 2p "$0" | cut -c3-; exit 0 ;; esac
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" -m sgt_titan.cli train "$@"
