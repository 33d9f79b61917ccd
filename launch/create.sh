#!/usr/bin/env bash
# Creates a TPU slice and returns once it is ready.
#
#   launch/create.sh --name=pod --zone=us-central2-b --type=v4-512 [--spot] [--queued] [-- FLAGS]
#
#   --type=TYPE        v4-512, v5litepod-256 (or v5e-256), v5p-128, v6e-256, ...
#   --version=IMAGE    VM software (default: the version that Google recommends for the type)
#   --spot             request cheaper capacity that Google may reclaim (see launch/keep.sh)
#   --queued           request the slice through a queued resource, which waits for capacity
#   --poll=SECONDS     interval between checks of a queued resource (default: 30)
#   --project=PROJECT  Google Cloud project (default: the one gcloud is set to)
#   --dry-run          print the commands without running them
#
# FLAGS are the flags you will give launch/start.sh. If present, this script checks them before it
# requests the slice. Invalid input ends it with exit code 2.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
opt+=([type]="" [version]="" [spot]=false [queued]=false [poll]=30)
parse "$@"
need name zone type
need_whole poll

mapfile -t flags < <(given_flags name zone type)
checked=$(check "${flags[@]}")
read -r type version <<<"$checked"
version=${opt[version]:-$version}
spot=()
if ${opt[spot]}; then spot=(--spot); fi

if ! ${opt[queued]}; then
  tpus tpu-vm create "${opt[name]}" --accelerator-type="$type" --version="$version" "${spot[@]}"
  exit
fi

tpus queued-resources create "${opt[name]}" --node-id="${opt[name]}" \
  --accelerator-type="$type" --runtime-version="$version" "${spot[@]}"
if ${opt[dry-run]}; then exit; fi
while true; do
  state=$(slice_state)
  case $state in
    READY) exit ;;
    WAIT) sleep "${opt[poll]}" ;;
    *) echo "error: the queued resource ${opt[name]} failed ($state)" >&2 && exit 1 ;;
  esac
done
