#!/usr/bin/env bash
# Makes all workers save a checkpoint of the same step and stop.
#
#   launch/stop.sh --name=pod --zone=us-central2-b
#
#   --project=PROJECT  Google Cloud project (default: the one gcloud is set to)
#   --dry-run          print the commands without running them
#
# Stop launch/keep.sh first; it would start the run again.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
parse "$@"

on_workers all stop
