#!/usr/bin/env bash
# Has all workers save a checkpoint of the same step and stop.
#
#   launch/stop.sh --name=pod --zone=us-central2-b
#
#   --project=PROJECT  by default gcloud's own
#   --dry-run          print the commands, run nothing
#
# End launch/keep.sh first, or it starts the run again.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
parse "$@"

on_workers all stop
