#!/usr/bin/env bash
# Shows a live run: the state of each worker, step, rate, last checkpoint and TensorBoard command.
#
#   launch/status.sh --name=pod --zone=us-central2-b --workdir=/mnt/share/base64
#
#   --project=PROJECT  Google Cloud project (default: the one gcloud is set to)
#   --dry-run          print the commands without running them

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
opt+=([workdir]="")
parse "$@"
need name zone workdir

on_workers all state
on_workers 0 status "${opt[workdir]}"
