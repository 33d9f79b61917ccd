#!/usr/bin/env bash
# Starts or resumes training on all workers of a slice and returns. The run no longer depends on
# this machine.
#
#   launch/start.sh --name=pod --zone=us-central2-b -- \
#       --config=configs/base64.py --workdir=/mnt/share/base64 --config.data.dir=/mnt/share/data
#
#   --image=IMAGE      run in the container that launch/setup.sh pulled
#   --project=PROJECT  Google Cloud project (default: the one gcloud is set to)
#   --dry-run          print the commands without running them
#
# Words after -- are flags of imagen_jax.train. Invalid input ends this script with exit code 2.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
opt+=([image]="")
parse "$@"
need name zone
need_train_args
mapfile -t flags < <(given_flags name zone image)
check "${flags[@]}" >/dev/null

on_workers all start "${opt[image]}" "${train_args[@]}"
