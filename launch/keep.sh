#!/usr/bin/env bash
# Keeps a run going to its end: creates the slice, sets it up and starts training, and does so again
# whenever the slice is preempted or a worker fails. The run goes on from its last checkpoint.
#
#   launch/keep.sh --name=pod --zone=us-central2-b --type=v4-512 --spot -- \
#       --config=configs/base64.py --workdir=/mnt/share/base64
#
#   --type, --version, --spot, --queued   as in launch/create.sh
#   --image, --mount                      as in launch/setup.sh
#   --max-restarts=N   give up after the run has failed N times, preemptions not counted; default 20
#   --poll=SECONDS     between two looks; default 60
#   --project=PROJECT  by default gcloud's own
#   --dry-run          print the commands of the first start, run nothing
#
# Exits with 0 once training is done, 2 if it refused its input, 1 if it gave up. The slice stays:
# delete it with launch/delete.sh. Run this where it can stay up; ending it leaves the run alone.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
opt+=([type]="" [version]="" [spot]=false [queued]=false [image]="" [mount]=""
  [max-restarts]=20 [poll]=60)
parse "$@"
need name zone type
((${#rest[@]})) || die "nothing to start; give the arguments of imagen_jax.train after --"
restarts=0

say() {
  echo "$(date -u +%FT%TZ) ${opt[name]}: $*"
}

mapfile -t slice < <(passed_on name zone project dry-run)
mapfile -t create_flags < <(passed_on type version spot queued poll)
mapfile -t delete_flags < <(passed_on queued)
mapfile -t setup_flags < <(passed_on image mount)
mapfile -t start_flags < <(passed_on image)

create() { "$here/create.sh" "${slice[@]}" "${create_flags[@]}"; }
delete() { "$here/delete.sh" "${slice[@]}" "${delete_flags[@]}"; }
start() { "$here/start.sh" "${slice[@]}" "${start_flags[@]}" -- "${rest[@]}"; }
begin() { "$here/setup.sh" "${slice[@]}" "${setup_flags[@]}" && start; }

# What the workers say, each line once: none, running, or exit and a code. Fails if none answers.
states() {
  local ask="imagen_jax/launch/worker.sh state"
  tpus tpu-vm ssh "${opt[name]}" --worker=all \
    --command="if [ -e imagen_jax/launch/worker.sh ]; then $ask; else echo none; fi" |
    grep -E '^(none|running|exit [0-9]+)$' | sort -u
}

# Does what is to be done on a slice that is there.
look() {
  local found
  found=$(states) || return 0
  found=${found//$'\n'/, }
  case ", $found," in
    *", running,"*) return ;;
    # Also where the others gave up on a worker that could not be started.
    *", none,"*) say "setting up and starting" && begin && return ;;
    *", exit 2,"*) say "training refused its input; launch/logs.sh has the line" && exit 2 ;;
    ", exit 0,") say "training is done" && exit 0 ;;
    ", exit 75,") ;; # all saved and stopped, as before a preemption
    *)
      restarts=$((restarts + 1))
      ((restarts <= opt[max-restarts])) || { say "failed too often ($found)" && exit 1; }
      ;;
  esac
  say "starting again ($found)" && start
}

if ${opt[dry-run]}; then
  create && begin && exit
fi
while true; do
  case $(slice_state) in
    GONE) say "creating the slice" && create && begin ;;
    DEAD) say "preempted; deleting what is left" && delete ;;
    READY) look ;;
    WAIT) ;;
  esac || say "failed; trying again"
  sleep "${opt[poll]}"
done
