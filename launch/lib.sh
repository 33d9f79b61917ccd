# Sourced by the scripts beside it: flags, one-line errors, dry runs, and gcloud's TPU commands.
# A script sets `opt` (its flags with their defaults; "false" marks a switch) and calls `parse`.
# shellcheck shell=bash

set -euo pipefail
# shellcheck disable=SC2034  # for the scripts that source this
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

die() {
  echo "error: $*" >&2
  exit 2
}

((BASH_VERSINFO[0] >= 4)) || die "bash is $BASH_VERSION; 4 or newer is needed"

# The flags that every script has.
declare -A opt=([name]="" [zone]="" [project]="" [dry-run]=false)
rest=()

# The comment at the top of the script is its help.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# Fills `opt` from --key=value and --switch, and `rest` with what follows `--`.
parse() {
  local key value
  while (($#)); do
    case $1 in
      -h | --help) usage && exit 0 ;;
      --) shift && rest=("$@") && break ;;
      --*=*) key=${1%%=*} value=${1#*=} ;;
      --*) key=$1 value=true ;;
      *) die "unexpected argument '$1'; flags are written --name=value (see --help)" ;;
    esac
    key=${key#--}
    [[ -v "opt[$key]" ]] || die "unknown flag --$key (see --help)"
    case ${opt[$key]} in
      true | false) [[ $value == true || $value == false ]] || die "--$key is '$value'; it is a switch" ;;
      *) [[ $1 == *=* ]] || die "--$key has no value; write --$key=VALUE" ;;
    esac
    opt[$key]=$value
    shift
  done
}

# Each named flag must have a value.
need() {
  local key
  for key in "$@"; do
    [[ -n ${opt[$key]} ]] || die "--$key is missing (see --help)"
  done
}

# The words as a shell would read them back.
quoted() {
  local words
  printf -v words '%q ' "$@"
  echo "${words% }"
}

# Runs a command, or prints it in a dry run.
run() {
  if ${opt[dry-run]}; then quoted "$@"; else "$@"; fi
}

# gcloud compute tpus WORDS..., in the zone and project of the flags.
tpus() {
  need name zone
  run gcloud compute tpus "$@" --zone="${opt[zone]}" ${opt[project]:+--project="${opt[project]}"}
}

# Runs launch/worker.sh with these words on workers $1: all, or a number.
on_workers() {
  local workers=$1
  shift
  tpus tpu-vm ssh "${opt[name]}" --worker="$workers" \
    --command="$(quoted imagen_jax/launch/worker.sh "$@")"
}

# Those of the named flags that were given, a line each, to pass them on.
passed_on() {
  local key
  for key in "$@"; do
    [[ -z ${opt[$key]} || ${opt[$key]} == false ]] || echo "--$key=${opt[$key]}"
  done
}

# READY, WAIT (not yet, or gcloud does not answer), DEAD (preempted or failed) or GONE.
slice_state() {
  local look=(tpu-vm describe "${opt[name]}" --format="value(state)") out
  if ${opt[queued]}; then look=(queued-resources describe "${opt[name]}" --format="value(state.state)"); fi
  # No answer must not look like no slice: what is GONE is made anew.
  out=$(tpus "${look[@]}" 2>&1) || {
    if [[ $out == *NOT_FOUND* ]]; then echo GONE; else echo WAIT; fi
    return
  }
  case ${out##*$'\n'} in
    READY | ACTIVE) echo READY ;;
    PREEMPTED | TERMINATED | STOPPED | FAILED | SUSPENDED) echo DEAD ;;
    *) echo WAIT ;;
  esac
}
