#!/usr/bin/env bash
# Set up and start. From top to bottom:
#   1 words         help, errors
#   2 interpreter   a finished .venv, else a python3 that has the packages, else a new .venv
#   3 settings      arguments > environment > profile
#   4 data          the embedded set is built on first use
#   5 run           one process, or one for each GPU
#   6 commands      what the first argument chooses
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"  # relative paths are relative to the repository
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}  # spinning threads: steps 4 times slower on a CPU others use too

# ---- 1 words
tools=(inspect sample sweep runs report record data bench parity systems plan survive)  # each says more with --help
script_of() {  # TOOL
  case $1 in
    data) echo data/prepare.py ;;
    inspect) echo tools/inspect_artifact.py ;;
    *) echo "tools/$1.py" ;;
  esac
}
usage() {
  local name file
  cat <<'EOF'
bash run.sh [PROFILE] [KEY=VALUE...]   set up and run train_gpt.py; without PROFILE: default with GPUs, smoke without
bash run.sh eval ARTIFACT [PROFILE] [KEY=VALUE...]   score an artifact without training; model settings are its own
bash run.sh audit ARTIFACT [PROFILE] [KEY=VALUE...]  show on a piece of text that its scores are legal (tools/audit.py);
                                       AUDIT=1 bash run.sh ... does it after a run
bash run.sh test [PYTEST ARGUMENTS]    set up and run the tests
bash run.sh settings                   every KEY with its default, range and meaning
bash run.sh help                       this text

KEY=VALUE arguments override environment variables, which override the profile. SCALE=tiny shrinks the profile to a run
of half a minute on two CPU cores, with every feature on (tools/tiny.py). TENSORBOARD=1 and WANDB_ENABLED=1 send what a
run measures (tools/track.py). NNODES, NODE_RANK and RDZV_ENDPOINT=HOST:PORT run on several machines; NPROC_PER_NODE is
the number of processes on each, MAX_RESTARTS how often failed ones are started again.

The tools; each says more with --help:
EOF
  for name in "${tools[@]}"; do
    printf 'bash run.sh %-8s %s\n' "$name" "$(sed -n '1s/^"*//p' "$(script_of "$name")")"
  done
  printf '\nThe profiles:\n'
  for file in profiles/*.env; do
    printf '  %-23s %s\n' "$(basename "$file" .env)" "$(sed -n '1s/^# *//p' "$file")"
  done
}
words() { usage | sed -n 's/^bash run.sh \([a-z]*\) .*/\1/p; s/^\(  [^ ]*\) .*/\1/p'; }  # commands; indented: profiles
near() {  # WORD: which command or profile may be meant; any python3 will do, and none is needed
  python3 tools/check_settings.py --near "$1" $(words) 2>/dev/null || true
}
die() { echo "error: $*" >&2; exit 2; }
note() { echo "run.sh: $*" >&2; }

# ---- 2 interpreter
has() {  # PYTHON MODULE...: does it have these modules, and a torch that is new enough?
  "$1" -c 'import sys, importlib.util as util, importlib.metadata as metadata
if sys.version_info < (3, 10) or not all(map(util.find_spec, sys.argv[1:])): sys.exit(1)
sys.exit([int(part) for part in metadata.version("torch").split(".")[:2]] < [2, 9])' "${@:2}" 2>/dev/null
}
pinned() { .venv/bin/python --version; cat requirements.txt tests/requirements.txt; }  # .venv/installed is a copy
choose_python() {  # MODULE...: sets $python
  python=.venv/bin/python
  [ "$(cat .venv/installed 2>&1)" != "$(pinned 2>&1)" ] || return 0
  if has python3 "$@"; then python=python3; return; fi
  $python -m pip --version >/dev/null 2>&1 || make_venv
  pip_install requirements.txt tests/requirements.txt
  pinned >.venv/installed  # last: an interrupted install is done again
}
pip_install() {  # FILE...: the packages they list, into .venv
  local files="${what:-$*}"
  note "installing ${files// / and } into .venv"
  $python -m pip install --disable-pip-version-check $([ -t 1 ] || echo --quiet) "${@/#/-r}" ||
    die "pip failed, for the reason above; without a network, use a python3 that has the packages"
}
make_venv() {
  local base='' candidate problem
  for candidate in python3 python3.13 python3.12 python3.11; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && base=$candidate && break
  done
  [ "$base" ] || die "there is no python3 of version 3.11 or newer (3.10 is enough if it has torch 2.9 or newer)"
  "$base" -c 'import venv, ensurepip' 2>/dev/null ||
    die "$base lacks its venv module; install it (Debian and Ubuntu: apt install python3-venv)"
  note "making .venv with $("$base" --version)"
  problem=$("$base" -m venv --clear .venv 2>&1) || die "cannot make .venv: ${problem##*$'\n'}"
}
to_run() { choose_python torch numpy sentencepiece; }
need() {  # PACKAGE: of tools/requirements.txt, for one command; a python3 of the user's stays as it is
  if [[ $python == .venv/* ]] && ! $python -c "import $1" 2>/dev/null; then
    what=$1 pip_install <(grep "^$1==" tools/requirements.txt)
  fi
}

# ---- 3 settings
take_arguments() {  # KEY=VALUE...: sets $python; exports them if each KEY is a setting or another program's
  local pair
  for pair; do
    [[ $pair =~ ^[A-Z][A-Z0-9_]*= ]] || die "'$pair' is not KEY=VALUE with an upper-case KEY (bash run.sh help)"
  done
  to_run
  [ $# = 0 ] || "$python" train_gpt.py --names | "$python" tools/check_settings.py "$@" || exit 2
  for pair; do export "$pair"; done
}
artifact=''                 # set if the command is about an artifact
left_out='' overridden=''   # keys that the profile does not set: for the data's sake; for another name of the setting
profile_lines() { sed 's/#.*//; s/[[:space:]]*$//; /^$/d' "$@"; }  # FILE or stdin: without comments
export_lines() {  # FILE: exports its KEY=VALUE lines; a variable that is set keeps its value
  local line key
  while IFS= read -r line || [ "$line" ]; do
    [[ $line =~ ^[A-Z][A-Z0-9_]*=[^[:space:]]*$ ]] || die "$1: '$line' is not KEY=VALUE"
    key=${line%%=*}
    [ "${!key+set}" ] || [[ " $left_out $overridden " == *" $key "* ]] || export "$key=${line#*=}"
  done < <(profile_lines "$1")
}
check_profile() {  # FILE: its keys have to be settings, none twice; one that is set under another name does not count
  overridden=$("$python" train_gpt.py --names | "$python" tools/check_settings.py --profile "$1") || exit 2
}
scaled=''  # what SCALE changed: a table that is a profile, too
scale() {  # PROFILE: SCALE=tiny shrinks it. Comes before the profile, whose values it replaces, and after the arguments
  [ "${SCALE+set}" ] || return 0
  [ -z "$artifact" ] || die "SCALE shrinks a model before training; an artifact has its size"
  scaled=$("$python" tools/scale.py "$SCALE" "$1") || exit 2
  echo "$scaled" >&2
  export_lines /dev/stdin <<<"$scaled"
}

# ---- 4 data
embedded=./data/datasets/embedded_sp1024  # the number is its vocabulary
has_shards() {
  local shard
  for shard in "$1"/fineweb_val_*.bin; do [ ! -e "$shard" ] || return 0; done
  return 1
}
choose_data() {  # PROFILE: DATA_PATH, TOKENIZER_PATH and VOCAB_SIZE belong together and come from one place
  local data vocab
  data=$(profile_lines "profiles/$1.env" | sed -n 's/^DATA_PATH=//p')
  if [ "${VOCAB_SIZE:-}" ] && [ -z "${DATA_PATH:-}$artifact" ] && [[ $data != *_sp"$VOCAB_SIZE" ]]; then
    left_out='DATA_PATH TOKENIZER_PATH'  # train_gpt.py finds the data of another vocabulary
    return
  fi
  if [ "$1" = default ] && [ -z "${DATA_PATH:-}$artifact" ] && ! has_shards "$data"; then
    note "no FineWeb in $data, so this run uses the small embedded text;" \
      "to fetch it: bash run.sh data fineweb --variant sp1024 --train-shards 80"
    export DATA_PATH=$embedded
  fi
  # train_gpt.py finds the tokenizer of a data folder, and both for an artifact
  [ -z "${DATA_PATH:-}" ] || left_out='TOKENIZER_PATH VOCAB_SIZE'
  [ -z "$artifact" ] || left_out='DATA_PATH TOKENIZER_PATH VOCAB_SIZE'
  data=${DATA_PATH:-$data} vocab=${data#"${embedded%1024}"}
  [[ ! $vocab =~ ^[0-9]+$ ]] ||
    { has_shards "$data" && [ -f "./data/tokenizers/embedded_${vocab}_bpe.model" ]; } ||
    "$python" data/prepare.py embedded $([ "$vocab" = 1024 ] || echo "--vocab-size $vocab") >&2
}

# ---- 5 run
count_gpus() {
  if [ "${DEVICE:-}" != cpu ] && { [ -e /dev/nvidiactl ] || command -v nvidia-smi >/dev/null; }; then
    "$python" -c 'import torch; print(torch.cuda.device_count())'
  else
    echo 0
  fi
}
ready() {  # [PROFILE] KEY=VALUE...: sets $python, $gpus and the environment of a run
  local profile=''
  gpus=''
  case ${1:-} in '' | *=*) ;; *) profile=$1; shift ;; esac
  [ -z "$profile" ] || [ -f "profiles/$profile.env" ] ||
    die "unknown command or profile '$profile'$(near "$profile") (profiles:" $(words | sed -n 's/^  //p')")"
  take_arguments "$@"
  if [ -z "$profile" ]; then
    gpus=$(count_gpus)
    [ "$gpus" = 0 ] && profile=smoke || profile=default
  fi
  export PROFILE=$profile  # for the log
  check_profile "profiles/$profile.env"
  scale "$profile"
  choose_data "$profile"
  export_lines "profiles/$profile.env"
  gpus=${gpus:-$(count_gpus)}  # after the profile: it may set DEVICE
  note "profile $profile, $([ "$gpus" = 0 ] && echo CPU || echo "$gpus GPU"), $python"
}
name_run() { export RUN_ID=${RUN_ID:-$(date +%Y%m%d-%H%M%S)-$RANDOM}; }
launcher() {  # sets $launch: Python alone, or what starts this machine's ranks and finds those of the others
  local nodes=${NNODES:-1} node=${NODE_RANK:-} ranks=${NPROC_PER_NODE:-$gpus} restarts=${MAX_RESTARTS:-0} pair
  [ "$node" ] || [ "$nodes" != 1 ] || node=0
  for pair in "NNODES=$nodes" "NODE_RANK=$node" "NPROC_PER_NODE=$ranks" "MAX_RESTARTS=$restarts"; do
    [[ $pair =~ =(0|[1-9][0-9]{0,5})$ ]] || die "$pair is not a whole number"
  done
  [ "$node" -lt "$nodes" ] || die "NODE_RANK=$node does not exist in NNODES=$nodes: machines are numbered from 0"
  [ "$gpus" = 0 ] || [ "$ranks" -le "$gpus" ] || die "NPROC_PER_NODE=$ranks, but this machine has $gpus GPU"
  [ "$nodes" = 1 ] || [[ ${RDZV_ENDPOINT:-} =~ ^[^[:space:]]+:[1-9][0-9]*$ ]] ||
    die "RDZV_ENDPOINT=${RDZV_ENDPOINT:-} is not HOST:PORT of the machine with NODE_RANK=0, where $nodes machines meet"
  launch=("$python")
  [ "$nodes" -gt 1 ] || [ "$ranks" -gt 1 ] || [ "$restarts" -gt 0 ] || return 0
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}  # torchrun would say 1; rank 0 packs the weights on the CPU
  export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}  # or a lost machine is a page of C++ stack frames
  launch+=(tools/launch.py)
  if [ "$nodes" = 1 ]; then
    launch+=(--standalone)
  else
    launch+=(--nnodes="$nodes" --node_rank="$node" --rdzv_backend=c10d --rdzv_endpoint="$RDZV_ENDPOINT")
    note "machine $node of 0 to $((nodes - 1)) meets the others at $RDZV_ENDPOINT"
  fi
  [ "$restarts" = 0 ] || { launch+=(--max_restarts="$restarts"); name_run; }  # it goes on under the same name
  launch+=(--nproc_per_node="$((ranks > 1 ? ranks : 1))")
}
built_size() { "$python" tools/record.py build >/dev/null 2>&1 && wc -c <build/train_gpt.py || echo 0; }  # 0: unknown
track() {  # sets $tracker: a process that sends what the run logs, as it comes
  [ "${TENSORBOARD:-0}" = 0 ] || need tensorboard
  [ "${WANDB_ENABLED:-0}" = 0 ] || need wandb
  RUN_SH_TRACKS=1 "$python" tools/track.py &
  tracker=$!
  export WANDB_ENABLED=0
}
as_child() {  # COMMAND...: sets $code, its exit code. A signal to this shell is the command's, which may save a checkpoint
  set -m  # a group of its own: Ctrl-C reaches it once, through this shell
  "$@" &
  local child=$! signal
  set +m
  for signal in HUP INT TERM; do trap "kill -$signal $child 2>/dev/null || true" "$signal"; done
  while code=0; wait "$child" || code=$?; kill -0 "$child" 2>/dev/null; do :; done  # a signal ends wait, too
  trap - HUP INT TERM
}
run() {  # [PROFILE] KEY=VALUE...; AUDIT=1: and then the audit of what was scored, AUDIT=only: that alone
  ready "$@"
  export CODE_BYTES=${CODE_BYTES:-$(built_size)}  # what is submitted is the built script, not the readable one
  local launch audit=${AUDIT:-0} of=${EVAL_ARTIFACT:-} home=${ARTIFACT_DIR:-${OUT_DIR:-.}}
  launcher
  [[ $audit =~ ^(0|1|only)$ ]] || die "AUDIT=$audit is not one of 0, 1, only"
  [ "$audit" != only ] || [ "$of" ] || die "AUDIT=only looks at an artifact: bash run.sh audit ARTIFACT"
  local tracked=''
  [ "${TENSORBOARD:-0}${WANDB_ENABLED:-0}" = 00 ] || tracked=1
  [ "$audit$scaled$tracked" != 0 ] || exec "${launch[@]}" train_gpt.py
  if [ "$audit" != only ]; then
    name_run  # the audit's files go beside the log, the table into it
    local code=0 log=$home/logs/$RUN_ID.txt
    [ -z "$tracked" ] || track
    as_child "${launch[@]}" train_gpt.py
    [ -z "$tracked" ] || { kill "$tracker" 2>/dev/null || true; wait "$tracker" || true; }
    [ -z "$scaled" ] || [ ! -f "$log" ] || echo "$scaled" >>"$log"
    [ "$code$audit" = 01 ] || exit "$code"
  fi
  export RUN_SH_COMMAND="bash run.sh audit"
  # not its link in $home, which may be another run's by now
  exec "${launch[@]}" tools/audit.py "${of:-$home/runs/$RUN_ID/final_model.ptz}"
}

# ---- 6 commands
tool() {  # ARGUMENT...: calls itself `bash run.sh COMMAND` in usage and error lines
  export RUN_SH_COMMAND="bash run.sh $command"
  exec "$python" "$(script_of "$command")" "$@"
}
artifact_tool() {  # ARGUMENT...: with the environment of a run, which depends on two settings among them
  local argument help=''
  for argument; do
    case $argument in
      DEVICE=* | DATA_PATH=*) export "$argument" ;;
      -h | --help) help=1 ;;
    esac
  done
  artifact=1
  if [ "$help" ]; then to_run; else ready; fi
  tool "$@"
}
command=${1:-}
case $command in
  help | -h | --help) usage ;;
  test)
    shift
    choose_python torch numpy sentencepiece pytest hypothesis
    where=tests
    for argument; do [ ! -e "${argument%%::*}" ] || where=''; done  # an argument names the tests to run
    workers=$("$python" -c 'import xdist' 2>/dev/null && echo '-n 2') || true
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec "$python" -m pytest ${where:+tests $workers} "$@" ;;
  data)
    shift
    to_run
    # pyarrow is large, so it comes with the first .parquet file; a python3 of the user's stays as it is
    if [[ " $*" == *.parquet* && $python == .venv/* ]] && ! $python -c 'import pyarrow' 2>/dev/null; then
      pip_install data/requirements.txt
    fi
    tool "$@" ;;
  report) shift; to_run; need plotly; tool "$@" ;;
  sweep) shift; to_run; need optuna; tool "$@" ;;
  sample) shift; artifact_tool "$@" ;;
  bench | inspect | parity | plan | record | runs | survive | systems) shift; to_run; tool "$@" ;;
  eval | audit)
    [[ $command != audit || ${2:-} != @(-h|--help) ]] || { to_run; tool --help; }
    case ${2:-} in '' | -* | [A-Z]*=*) die "$command needs a file: bash run.sh $command ARTIFACT [KEY=VALUE...]" ;; esac
    artifact=1
    export EVAL_ARTIFACT=$2
    [ "$command" = eval ] || AUDIT=only
    run "${@:3}" ;;
  settings) to_run; exec "$python" train_gpt.py --help ;;
  *) run "$@" ;;
esac
