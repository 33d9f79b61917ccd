# Shared by the scripts in this folder: flags, one-line errors, dry runs, and gcloud's TPU commands.
# A script adds its flags and their defaults to `opt` ("false" marks a switch) and calls `parse`.
# shellcheck shell=bash

set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() {
  echo "error: $*" >&2
  exit 2
}

((BASH_VERSINFO[0] >= 4)) || die "bash is $BASH_VERSION; 4 or newer is needed"

# Flags common to all scripts.
declare -A opt=([name]="" [zone]="" [project]="" [dry-run]=false)
train_args=()

# Prints the comment at the top of the script.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# Fills `opt` from --key=value and --switch, and `train_args` from the words after `--`.
parse() {
  local key value
  while (($#)); do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --) shift && train_args=("$@") && break ;;
      --*=*) key=${1%%=*} value=${1#*=} ;;
      --*) key=$1 value=true ;;
      *) die "unexpected argument '$1'; write flags as --name=value (see --help)" ;;
    esac
    key=${key#--}
    [[ -v "opt[$key]" ]] || die "unknown flag --$key (see --help)"
    case ${opt[$key]} in
      true | false) [[ $value == true || $value == false ]] || die "--$key is '$value'; allowed: true, false" ;;
      *) [[ $1 == *=* ]] || die "--$key has no value; write --$key=VALUE" ;;
    esac
    opt[$key]=$value
    shift
  done
}

# Refuses named flags without a value.
need() {
  local key
  for key in "$@"; do
    [[ -n ${opt[$key]} ]] || die "--$key is missing (see --help)"
  done
}

# Refuses named flags that are not whole numbers of 0 or more. A leading 0 would make bash read the
# number as octal.
need_whole() {
  local key
  for key in "$@"; do
    [[ ${opt[$key]} =~ ^(0|[1-9][0-9]{0,8})$ ]] ||
      die "--$key is '${opt[$key]}'; allowed: a whole number from 0 to 999999999"
  done
}

need_train_args() {
  ((${#train_args[@]})) || die "nothing to start; give the flags of imagen_jax.train after --"
}

# Runs launch/check.py with these flags and `train_args`: invalid input ends the script here, before
# it rents anything. Prints the accelerator type and runtime version that gcloud expects.
check() (
  modules="import importlib.util as u; assert all(map(u.find_spec, ('absl', 'jax')))"
  cd "$here/.." # like the workers: the path of the config is relative to the checkout
  for python in "${PYTHON:-python3}" .venv/bin/python; do
    if "$python" -c "$modules" 2>/dev/null; then
      "$python" -m launch.check "$@" -- "${train_args[@]}"
      exit
    fi
  done
  die "${PYTHON:-python3} lacks the packages of this project; run \`make setup\` here, or set PYTHON"
)

# Prints the words quoted for a shell.
quoted() {
  local words
  printf -v words '%q ' "$@"
  echo "${words% }"
}

# Runs a command, or prints it in a dry run.
run() {
  if ${opt[dry-run]}; then quoted "$@"; else "$@"; fi
}

# Runs `gcloud compute tpus WORDS...` in the zone and project given by the flags.
tpus() {
  need name zone
  run gcloud compute tpus "$@" --zone="${opt[zone]}" ${opt[project]:+--project="${opt[project]}"}
}

# Runs `launch/worker.sh WORDS...` on workers $1, "all" or a number.
on_workers() {
  local workers=$1
  shift
  tpus tpu-vm ssh "${opt[name]}" --worker="$workers" \
    --command="$(quoted imagen_jax/launch/worker.sh "$@")"
}

# Prints the named flags that have a value, one per line.
given_flags() {
  local key
  for key in "$@"; do
    [[ -z ${opt[$key]} || ${opt[$key]} == false ]] || echo "--$key=${opt[$key]}"
  done
}

# Prints READY, WAIT (not ready yet, or gcloud does not answer), DEAD (preempted or failed) or GONE.
slice_state() {
  local words=(tpu-vm describe "${opt[name]}" --format="value(state)") out
  if ${opt[queued]}; then words=(queued-resources describe "${opt[name]}" --format="value(state.state)"); fi
  # An error is not GONE: keep.sh would create a second slice.
  out=$(tpus "${words[@]}" 2>&1) || {
    if [[ $out == *NOT_FOUND* ]]; then echo GONE; else echo WAIT; fi
    return
  }
  case ${out##*$'\n'} in
    READY | ACTIVE) echo READY ;;
    PREEMPTED | TERMINATED | STOPPED | FAILED | SUSPENDED) echo DEAD ;;
    *) echo WAIT ;;
  esac
}
