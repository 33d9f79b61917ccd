#!/usr/bin/env bash
# Collects the logs of all workers, one file each, or follows the log of worker 0.
#
#   launch/logs.sh --name=pod --zone=us-central2-b --out=logs
#   launch/logs.sh --name=pod --zone=us-central2-b --follow
#
#   --out=DIR          directory for the files (default: logs)
#   --follow           print worker 0's log as it grows, until Ctrl-C
#   --project=PROJECT  Google Cloud project (default: the one gcloud is set to)
#   --dry-run          print the commands without running them

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
opt+=([out]=logs [follow]=false)
parse "$@"

if ${opt[follow]}; then
  on_workers 0 follow
else
  run mkdir -p "${opt[out]}"
  tpus tpu-vm ssh "${opt[name]}" --worker=all --output-directory="${opt[out]}" \
    --command="imagen_jax/launch/worker.sh log"
fi
