#!/usr/bin/env bash
# Keeps a run going until training is done. Creates the slice, sets it up and starts training, and
# repeats this whenever the slice is preempted or a worker fails. Training resumes from its last
# checkpoint.
#
#   launch/keep.sh --name=pod --zone=us-central2-b --type=v4-512 --spot -- \
#       --config=configs/base64.py --workdir=/mnt/share/base64 --config.data.dir=/mnt/share/data
#
#   --type, --version, --spot, --queued   as for launch/create.sh
#   --image, --mount                      as for launch/setup.sh
#   --delete-when-done                    delete the slice once training is done
#   --max-restarts=N   give up after N failures of the run, not counting preemptions (default: 20)
#   --poll=SECONDS     interval between checks (default: 60)
#   --project=PROJECT  Google Cloud project (default: the one gcloud is set to)
#   --dry-run          print the commands of the first start without running them
#
# Exit codes: 0 training is done; 2 invalid input; 1 too many failures, or one that a restart repeats:
# training diverged, or every checkpoint is damaged. The slice stays unless --delete-when-done is set
# and training is done; launch/delete.sh deletes it. Run this script on a machine that stays up.
# Stopping the script does not stop the run.

source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
opt+=([type]="" [version]="" [spot]=false [queued]=false [image]="" [mount]=""
  [delete-when-done]=false [max-restarts]=20 [poll]=60)
parse "$@"
need name zone type
need_whole max-restarts poll
need_train_args
mapfile -t flags < <(given_flags name zone type image)
check "${flags[@]}" >/dev/null
restarts=0

log() {
  echo "$(date -u +%FT%TZ) ${opt[name]}: $*"
}

mapfile -t slice < <(given_flags name zone project dry-run)
mapfile -t create_flags < <(given_flags type version spot queued poll)
mapfile -t delete_flags < <(given_flags queued)
mapfile -t setup_flags < <(given_flags image mount)

create() { "$here/create.sh" "${slice[@]}" "${create_flags[@]}"; }
delete() { "$here/delete.sh" "${slice[@]}" "${delete_flags[@]}"; }
start() { on_workers all start "${opt[image]}" "${train_args[@]}"; }
setup_and_start() { "$here/setup.sh" "${slice[@]}" "${setup_flags[@]}" && start; }

# Prints the distinct states of the workers, one per line: none, running, or "exit CODE". Fails if
# no worker answers.
worker_states() {
  local state="imagen_jax/launch/worker.sh state"
  tpus tpu-vm ssh "${opt[name]}" --worker=all \
    --command="if [ -e imagen_jax/launch/worker.sh ]; then $state; else echo none; fi" |
    grep -E '^(none|running|exit [0-9]+)$' | sort -u
}

# Prints what the run recorded about its end in state.json, as worker 0 reads it; nothing if it
# cannot, for example because the storage is not mounted.
recorded() {
  local i workdir=""
  for ((i = 0; i < ${#train_args[@]}; i++)); do
    case ${train_args[i]} in
      --workdir=*) workdir=${train_args[i]#*=} ;;
      --workdir) workdir=${train_args[i + 1]:-} ;;
    esac
  done
  on_workers 0 recorded "$workdir" 2>/dev/null | tail -n 1 || true
}

# Ends the script after training is done. Retries a failed deletion, because a slice that stays
# costs money.
finish() {
  log "training is done"
  if ${opt[delete-when-done]}; then
    log "deleting the slice"
    until delete || [[ $(slice_state) == GONE ]]; do
      log "deleting failed; trying again"
      sleep "${opt[poll]}"
    done
  fi
  exit 0
}

# Takes the next action on a slice that is ready.
handle_ready() {
  local states
  states=$(worker_states) || return 0
  states=${states//$'\n'/, }
  case ", $states," in
    *", running,"*) return ;;
    # Comes before the exit codes: if one worker never started, the others give up waiting for it.
    *", none,"*) log "setting up and starting" && setup_and_start && return ;;
    *", exit 2,"*) log "training refused its input; see launch/logs.sh" && exit 2 ;;
    *", exit 65,"*) log "every checkpoint is damaged; see launch/logs.sh ($(recorded))" && exit 1 ;;
    *", exit 70,"*) log "training diverged; see launch/logs.sh ($(recorded))" && exit 1 ;;
    ", exit 0,") finish ;;
    ", exit 75,") ;; # saved and stopped, as on a preemption
    *)
      restarts=$((restarts + 1))
      states+="; the run recorded: $(recorded)"
      ((restarts <= opt[max-restarts])) || { log "too many failures ($states)" && exit 1; }
      ;;
  esac
  log "starting again ($states)" && start
}

if ${opt[dry-run]}; then
  create
  setup_and_start
  exit
fi
while true; do
  case $(slice_state) in
    GONE) log "creating the slice" && create && setup_and_start ;;
    DEAD) log "the slice was preempted or failed; deleting it" && delete ;;
    READY) handle_ready ;;
    WAIT) ;;
  esac || log "failed; trying again"
  sleep "${opt[poll]}"
done
