#!/usr/bin/env bash
# Copies this checkout to every worker of a slice, and installs it there or pulls a container.
#
#   launch/setup.sh --name=pod --zone=us-central2-b [--image=IMAGE] [--mount=COMMAND]
#
#   --image=IMAGE      run in this container (launch/Dockerfile) instead of a virtual environment
#   --mount=COMMAND    run on every worker, to mount what the workdir and the data lie on, for
#                      example "sudo mkdir -p /mnt/share && sudo mount 10.0.0.2:/share /mnt/share"
#   --project=PROJECT  by default gcloud's own
#   --dry-run          print the commands, run nothing
#
# Copied is what git tracks or would add, with changes that are not committed.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
opt+=([image]="" [mount]="")
parse "$@"
need name zone

code=$(mktemp -d)
trap 'rm -r "$code"' EXIT
git -C "$here/.." ls-files -z --cached --others --exclude-standard >"$code/files"
tar --directory="$here/.." --create --gzip --file="$code/code.tar.gz" --null --files-from="$code/files"

tpus tpu-vm scp "$code/code.tar.gz" "${opt[name]}:imagen_jax.tar.gz" --worker=all
tpus tpu-vm ssh "${opt[name]}" --worker=all \
  --command="mkdir -p imagen_jax && tar -xzf imagen_jax.tar.gz -C imagen_jax"
if [[ -n ${opt[mount]} ]]; then
  tpus tpu-vm ssh "${opt[name]}" --worker=all --command="${opt[mount]}"
fi
on_workers all install "${opt[image]}"
