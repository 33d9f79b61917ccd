#!/usr/bin/env bash
# Deletes a TPU slice and everything on its disks.
#
#   launch/delete.sh --name=pod --zone=us-central2-b [--queued]
#
#   --queued           the slice came from a queued resource; delete that too
#   --project=PROJECT  Google Cloud project (default: the one gcloud is set to)
#   --dry-run          print the commands without running them

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
opt+=([queued]=false)
parse "$@"

if ${opt[queued]}; then
  tpus queued-resources delete "${opt[name]}" --force --quiet
else
  tpus tpu-vm delete "${opt[name]}" --quiet
fi
