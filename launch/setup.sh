#!/usr/bin/env bash
# Copies this checkout to every worker of a slice, and installs it or pulls a container.
#
#   launch/setup.sh --name=pod --zone=us-central2-b [--image=IMAGE] [--mount=COMMAND]
#
#   --image=IMAGE      container to run in (launch/Dockerfile) instead of a virtual environment
#   --mount=COMMAND    command for every worker that mounts the storage of workdir and data, such as
#                      "sudo mkdir -p /mnt/share && sudo mount 10.0.0.2:/share /mnt/share"
#   --project=PROJECT  Google Cloud project (default: the one gcloud is set to)
#   --dry-run          print the commands without running them
#
# The copy has the files that git tracks or would add, including uncommitted changes.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
opt+=([image]="" [mount]="")
parse "$@"
need name zone

code=$(mktemp -d)
trap 'rm -r "$code"' EXIT
if ! ${opt[dry-run]}; then
  git -C "$here/.." ls-files -z --cached --others --exclude-standard >"$code/files"
  tar --directory="$here/.." --create --gzip --file="$code/code.tar.gz" --null --files-from="$code/files"
fi

tpus tpu-vm scp "$code/code.tar.gz" "${opt[name]}:imagen_jax.tar.gz" --worker=all
tpus tpu-vm ssh "${opt[name]}" --worker=all \
  --command="mkdir -p imagen_jax && tar -xzf imagen_jax.tar.gz -C imagen_jax"
if [[ -n ${opt[mount]} ]]; then
  tpus tpu-vm ssh "${opt[name]}" --worker=all --command="${opt[mount]}"
fi
on_workers all install "${opt[image]}"
