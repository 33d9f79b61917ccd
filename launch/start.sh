#!/usr/bin/env bash
# Starts training on all workers of a slice and returns; the run does not depend on this machine.
#
#   launch/start.sh --name=pod --zone=us-central2-b -- \
#       --config=configs/base64.py --workdir=/mnt/share/base64
#
#   --image=IMAGE      in the container that launch/setup.sh pulled
#   --project=PROJECT  by default gcloud's own
#   --dry-run          print the commands, run nothing
#
# What follows -- goes to imagen_jax.train. The same command goes on with a run that was stopped.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
opt+=([image]="")
parse "$@"
((${#rest[@]})) || die "nothing to start; give the arguments of imagen_jax.train after --"

on_workers all start "${opt[image]}" "${rest[@]}"
