#!/usr/bin/env bash
# Shows a live run: step rate, last checkpoint, TensorBoard directory, and what each worker does.
#
#   launch/status.sh --name=pod --zone=us-central2-b --workdir=/mnt/share/base64
#
#   --project=PROJECT  by default gcloud's own
#   --dry-run          print the commands, run nothing

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
opt+=([workdir]="")
parse "$@"
need name zone workdir

on_workers all state
on_workers 0 status "${opt[workdir]}"
