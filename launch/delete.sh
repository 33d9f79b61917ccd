#!/usr/bin/env bash
# Deletes a TPU slice. What lies on its disks is lost.
#
#   launch/delete.sh --name=pod --zone=us-central2-b [--queued]
#
#   --queued           the slice came from a queued resource, which goes with it
#   --project=PROJECT  by default gcloud's own
#   --dry-run          print the commands, run nothing

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
opt+=([queued]=false)
parse "$@"

if ${opt[queued]}; then
  tpus queued-resources delete "${opt[name]}" --force --quiet
else
  tpus tpu-vm delete "${opt[name]}" --quiet
fi
