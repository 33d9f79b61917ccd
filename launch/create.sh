#!/usr/bin/env bash
# Creates a TPU slice and returns once it is there.
#
#   launch/create.sh --name=pod --zone=us-central2-b --type=v4-512 [--spot] [--queued]
#
#   --type=TYPE        v4-512, v5litepod-256, v5p-128, v6e-256, ...
#   --version=IMAGE    the VMs' software; by default the one that Google names for the type
#   --spot             cheaper, and may be taken away at any time (see launch/keep.sh)
#   --queued           ask through a queued resource, which waits for capacity
#   --poll=SECONDS     between two looks at a queued resource; default 30
#   --project=PROJECT  by default gcloud's own
#   --dry-run          print the commands, run nothing

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
opt+=([type]="" [version]="" [spot]=false [queued]=false [poll]=30)
parse "$@"
need name zone type

case ${opt[type]} in
  v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  v5p-*) version=v2-alpha-tpuv5 ;;
  v6e-*) version=v2-alpha-tpuv6e ;;
  *) die "--type is '${opt[type]}'; allowed: v4-N, v5litepod-N, v5p-N, v6e-N" ;;
esac
version=${opt[version]:-$version}
spot=()
if ${opt[spot]}; then spot=(--spot); fi

if ! ${opt[queued]}; then
  tpus tpu-vm create "${opt[name]}" --accelerator-type="${opt[type]}" --version="$version" \
    "${spot[@]}"
  exit
fi

tpus queued-resources create "${opt[name]}" --node-id="${opt[name]}" \
  --accelerator-type="${opt[type]}" --runtime-version="$version" "${spot[@]}"
if ${opt[dry-run]}; then exit; fi
while true; do
  state=$(slice_state)
  case $state in
    READY) exit ;;
    WAIT) sleep "${opt[poll]}" ;;
    *) echo "error: the queued resource ${opt[name]} came to nothing ($state)" >&2 && exit 1 ;;
  esac
done
