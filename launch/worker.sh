#!/usr/bin/env bash
# Runs on each worker of a slice; the other launch scripts call it.
#
#   launch/worker.sh install IMAGE       set up the virtual environment; pull IMAGE instead if not ""
#   launch/worker.sh start IMAGE FLAGS   start imagen_jax.train FLAGS detached, in IMAGE if not ""
#   launch/worker.sh stop                make training save and stop
#   launch/worker.sh state               print none, running, or "exit CODE"
#   launch/worker.sh status WORKDIR      print step, rate, last checkpoint and TensorBoard command
#   launch/worker.sh recorded WORKDIR    print what the run's state.json says: running, or how it ended
#   launch/worker.sh log                 print the log
#   launch/worker.sh follow              print the log as it grows
#
# The log and the state are in ~/imagen_jax_run.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
state_dir=$HOME/imagen_jax_run
container=imagen_jax

die() {
  echo "error: $*" >&2
  exit 2
}

install() {
  if [[ -n ${1:-} ]]; then
    sudo docker pull --quiet "$1"
    return
  fi
  # The Python of the VMs is too old for this project.
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --allow-existing --python 3.11 .venv
  python3 -m uv pip install --quiet --python $python --constraint constraints.txt --editable '.[tpu]'
}

state() {
  if [[ -f $state_dir/exit ]]; then
    echo "exit $(<"$state_dir/exit")"
  elif [[ ! -f $state_dir/supervisor ]]; then
    echo none
  elif grep --quiet --text supervise "/proc/$(<"$state_dir/supervisor")/cmdline" 2>/dev/null; then
    echo running
  else
    echo "exit 137" # the VM restarted and killed the run
  fi
}

start() {
  [[ $(state) != running ]] || die "a run is already active; launch/stop.sh stops it"
  mkdir -p "$state_dir"
  rm -f "$state_dir/exit"
  setsid nohup "$PWD/launch/worker.sh" supervise "$@" >>"$state_dir/train.log" 2>&1 </dev/null &
  echo $! >"$state_dir/supervisor"
}

# Runs training and records its process ID, then its exit code.
supervise() {
  local image=$1 command=("$python" -u) code=0
  shift
  if [[ -n $image ]]; then
    command=(sudo docker run --rm --init --name "$container" --privileged --net=host
      --volume /mnt:/mnt "$image" python -u)
  fi
  "${command[@]}" -m imagen_jax.train --distributed "$@" &
  echo $! >"$state_dir/pid"
  wait $! || code=$?
  echo "$code" >"$state_dir/exit"
}

stop() {
  [[ $(state) == running ]] || return 0
  # A container runs as root, so `kill` fails.
  kill -TERM "$(<"$state_dir/pid")" 2>/dev/null || sudo docker kill --signal=TERM "$container"
}

status() {
  # Uses the VM's own Python: launch.status needs no packages, and with a container the VM has none.
  python3 -m launch.status --workdir="$1"
}

recorded() {
  python3 -m launch.status --workdir="$1" --state
}

case ${1:-} in
  install | start | supervise | stop | state | status | recorded) "$@" ;;
  log) cat "$state_dir/train.log" ;;
  follow) tail -n 50 -F "$state_dir/train.log" ;;
  *) sed -n '2,/^$/s/^# \{0,1\}//p' "$0" && [[ ${1:-} == --help ]] ;;
esac
