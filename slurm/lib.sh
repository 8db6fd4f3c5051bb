# shellcheck shell=bash
# The parts of train.sbatch in the order in which it uses them; it says what the variables mean. eval.sbatch
# uses some of them, too.

say() { echo "[$(date '+%F %T')] $*"; }

refuse() {
    echo "error: $*" >&2
    exit 2
}

# settle WORD...: decide on every size and name. FLAGS: how many of the words are not peergrad's.
settle() {
    FLAGS=0 DRY_RUN=${DRY_RUN:-} CONTAINER=() PREFLIGHT=()
    if [ "${1:-}" = --dry-run ]; then FLAGS=1 DRY_RUN=1; fi
    local site=${SITE:-slurm/site.sh}
    # shellcheck source=/dev/null
    [ ! -f "$site" ] || . "$site"
    name_nodes
    local gpus=${SLURM_GPUS_ON_NODE:-8} nodes=${#HOSTS[@]} name
    : "${NEED_NODES:=$nodes}"
    [[ $NEED_NODES =~ ^[0-9]+$ ]] || refuse "NEED_NODES = $NEED_NODES: must be a whole number"
    ((NEED_NODES >= 1 && NEED_NODES <= nodes)) ||
        refuse "NEED_NODES = $NEED_NODES: must lie in [1, $nodes], the nodes of the job; change it or sbatch --nodes"
    : "${TRAIN_NODES:=$(((NEED_NODES + 1) / 2))}" "${RANKS_PER_NODE:=$gpus}" "${SERVERS_PER_NODE:=$gpus}"
    : "${SERVER_PORT:=30000}" "${SERVER_WAIT:=900}" "${MAX_RESTARTS:=3}" "${GRACE:=300}"
    for name in TRAIN_NODES RANKS_PER_NODE SERVERS_PER_NODE SERVER_PORT SERVER_WAIT MAX_RESTARTS GRACE; do
        [[ ${!name} =~ ^[0-9]+$ ]] || refuse "$name = ${!name}: must be a whole number"
    done
    ((TRAIN_NODES >= 1 && TRAIN_NODES <= NEED_NODES)) ||
        refuse "TRAIN_NODES = $TRAIN_NODES: must lie in [1, $NEED_NODES], the nodes of the run; change it or sbatch --nodes"
    ((RANKS_PER_NODE >= 1 && SERVERS_PER_NODE >= 1)) ||
        refuse "RANKS_PER_NODE = $RANKS_PER_NODE, SERVERS_PER_NODE = $SERVERS_PER_NODE: must be 1 or more; set them, or sbatch --gpus-per-node"
    divide
    [ ! -x .venv/bin/python ] || : "${PYTHON:=.venv/bin/python}"
    : "${PYTHON:=python}"
    RESTART=${SLURM_RESTART_COUNT:-0}
    MASTER_PORT=$((20000 + ${SLURM_JOB_ID:-0} % 10000)) # below those that the kernel gives away
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN} PYTHONUNBUFFERED=1
}

# divide: the first NEED_NODES hosts into those that train and those that serve; others are spare.
divide() { TRAINING=("${HOSTS[@]:0:TRAIN_NODES}") SERVING=("${HOSTS[@]:TRAIN_NODES:NEED_NODES-TRAIN_NODES}"); }

# HOSTS and JOB, as Slurm calls them; for a dry run outside of an allocation made up.
name_nodes() {
    JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    JOB=${JOB:-${SLURM_JOB_ID:-JOB}}
    if [ -n "${SLURM_JOB_NODELIST:-}" ]; then
        mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    elif [ -n "$DRY_RUN" ]; then
        mapfile -t HOSTS < <(seq -f node%g "${NODES:-1}")
    else
        refuse "this is no Slurm job: sbatch $0 ..., or bash $0 --dry-run ..."
    fi
}

# step NAME HOST...: STEP is a srun of one task on each host. Peers of a task that failed get GRACE
# seconds to save and end by themselves.
step() {
    local name=$1
    shift
    STEP=(srun --quiet --job-name="$name" --nodes=$# --ntasks=$# --ntasks-per-node=1
        --nodelist="$(IFS=,; echo "$*")" --cpu-bind=none --kill-on-bad-exit=0 --wait="$GRACE"
        "${CONTAINER[@]}")
}

# check WORD...: end the job unless the configuration can run. RUN: the run's folder.
check() {
    local world=$((TRAIN_NODES * RANKS_PER_NODE)) words=("$@") whole place
    [ "$RESTART" = 0 ] || words+=(run.resume=true)
    step check "${HOSTS[0]}"
    whole=$("${STEP[@]}" env WORLD_SIZE="$world" "$PYTHON" -m peergrad.main --check --cfg "${words[@]}") || give_up $?
    mapfile -t place < <(sed -n "/^run:/,/^[^ ]/ { s/^  \(name\|root\): //p }" <<<"$whole" | sed "s/^'\(.*\)'$/\1/")
    [ "${#place[@]}" = 2 ] || refuse "run.name, run.root: not found in the configuration"
    RUN=${place[1]}/${place[0]}
}

# preflight WORD...: end the job unless NEED_NODES of its nodes can run it; leave the others out.
preflight() {
    local found=$RUN/slurm/preflight-$JOB.$RESTART status=0
    mkdir -p "$RUN/slurm" || exit 1
    step preflight "${HOSTS[@]}"
    "${STEP[@]}" "$PYTHON" tools/preflight.py --shared "$RUN/slurm" --id "$JOB.$RESTART" --need "$NEED_NODES" \
        --ports "$MASTER_PORT,$SERVER_PORT-$((SERVER_PORT + SERVERS_PER_NODE - 1))" "${PREFLIGHT[@]}" "$@" || status=$?
    case $status in
        0 | 3) mapfile -t -n "$NEED_NODES" HOSTS <"$found/good_nodes" ;;
        *) give_up "$status" ;;
    esac
    divide
}

# give_up STATUS: end with it before anything has begun; begin anew if that is because the job is being
# preempted, of which only the step has been told.
give_up() {
    [ "$1" = 2 ] || [ "${asked:-}" = TERM ] || [ -z "$(if_preempted)" ] || again
    exit "$1"
}

# urls: of all servers, joined by commas.
urls() {
    local host port found=()
    for host in "${SERVING[@]}"; do
        for ((port = SERVER_PORT; port < SERVER_PORT + SERVERS_PER_NODE; port++)); do
            found+=("http://$host:$port")
        done
    done
    (IFS=,; echo "${found[*]}")
}

# print_steps: what each node would run, its commands in the arrays train and serve.
# shellcheck disable=SC2154   # train.sbatch's
print_steps() {
    local rank host
    for rank in "${!TRAINING[@]}"; do print_step "${TRAINING[rank]}" "PET_NODE_RANK=$rank" "${train[@]}"; done
    for host in "${SERVING[@]}"; do print_step "$host" "${serve[@]}"; done
}

# print_step HOST WORD...: what the host would run, quoted for a shell; before the first, in which container.
print_step() {
    [ "${#CONTAINER[@]}" = 0 ] || echo "container:$(printf ' %q' "${CONTAINER[@]}")"
    CONTAINER=()
    echo "$1:$(printf ' %q' "${@:2}")"
}

# steps: of the run's newest checkpoint.
steps() {
    local latest=step_0
    [ ! -f "$RUN/checkpoints/latest" ] || read -r latest <"$RUN/checkpoints/latest" || :
    echo $((10#${latest##*_}))
}

# open_attempt: a folder for its logs, and a word on the attempt before if that came to none.
open_attempt() {
    local before=$RUN/slurm/$JOB.$((RESTART - 1))
    mkdir -p "$LOGS" || exit 1
    ln -sfn "${LOGS##*/}" "$RUN/slurm/latest"
    [ ! -f "$before/began" ] || [ -f "$before/ended" ] ||
        record "$before" $((RESTART - 1)) null "a node was lost, or Slurm ended the job at once"
    echo "$(date +%FT%T%z) $(steps) ${HOSTS[*]}" >"$LOGS/began"
    say "attempt $RESTART of job $JOB on ${HOSTS[*]}, from step $(steps); logs in $LOGS"
}

# record FOLDER RESTART STATUS WHY: a line in attempts.jsonl.
record() {
    local began from hosts
    read -r began from hosts <"$1/began"
    date +%FT%T%z >"$1/ended"
    printf '{"job": "%s", "restart": %s, "began": "%s", "ended": "%s", "from_step": %s, "to_step": %s, "status": %s, "why": "%s", "nodes": "%s"}\n' \
        "$JOB" "$2" "$began" "$(cat "$1/ended")" "$from" "$(steps)" "$3" "$4" "$hosts" >>"$RUN/attempts.jsonl"
}

# watch_over: have up to three other nodes see that the job does not outlive this one.
watch_over() {
    local CONTAINER=() others=() host
    for host in "${HOSTS[@]}"; do
        [ "$host" = "${SLURMD_NODENAME:-}" ] || others+=("$host")
    done
    for host in "${others[@]:0:3}"; do
        step watch "$host"
        "${STEP[@]}" --overlap bash slurm/watch.sh "$SLURM_JOB_ID" "$SLURMD_NODENAME" &>>"$LOGS/watch.log" &
    done
}

# start_servers WORD...: on every serving node, until all have ended. A step for each: srun gives up
# all of a step when one of its nodes is lost. The status is that of the last one that failed.
start_servers() {
    local host pid pids=() status=0
    for host in "${SERVING[@]}"; do
        step servers "$host"
        "${STEP[@]}" bash slurm/task.sh servers "$@" &
        pids+=($!)
    done
    trap 'kill -s USR1 "${pids[@]}" 2>/dev/null' USR1
    trap 'kill -s TERM "${pids[@]}" 2>/dev/null' TERM
    for pid in "${pids[@]}"; do
        while alive "$pid"; do wait "$pid"; done # comes back for every signal
        wait "$pid" || status=$?
    done
    return "$status"
}

alive() { kill -0 "$1" 2>/dev/null; }

pause() { # that a trapped signal cuts short
    sleep 1 &
    wait $!
}

# bring_down NAME PID: have the step end, within GRACE seconds of its own accord. ENDED: its status.
# srun hands USR1 on by itself; scancel cannot any more once the job is being cancelled. After TERM
# srun kills its tasks.
# shellcheck disable=SC2034   # train.sbatch reads ENDED
bring_down() {
    local pid=$2 end=$((SECONDS + GRACE))
    ENDED=0
    [ -n "$pid" ] || return 0
    while alive "$pid" && ((SECONDS < end)); do
        kill -s USR1 "$pid"
        pause
    done
    if alive "$pid"; then
        say "the step $1 has not ended within GRACE = $GRACE s"
        kill -s TERM "$pid"
    fi
    while alive "$pid"; do pause; done
    wait "$pid"
    ENDED=$?
}

# report_servers: why they have ended, as far as their log tells.
report_servers() {
    say "the servers have ended; $LOGS/servers.log ends with:"
    tail -n 5 "$LOGS/servers.log"
}

# close_attempt STATUS FIRST: the attempt's line. FIRST: the step that ended first. OUTCOME: whether
# to go on in another attempt.
# shellcheck disable=SC2034   # train.sbatch reads OUTCOME
close_attempt() {
    local why="the step $2 failed"
    OUTCOME=again
    case $1 in
        0) OUTCOME=finished why=finished ;;
        2) OUTCOME=wrong why="the configuration is wrong" ;;
        75) why="stopped and saved${asked:+, for $asked}$(if_preempted)" ;;
    esac
    [ "$2" = trainer ] || why="the step servers ended"
    if [ "$RUN/DONE" -nt "$LOGS/began" ]; then OUTCOME=finished why=finished; fi
    record "$LOGS" "$RESTART" "$1" "$why"
    say "attempt $RESTART: $why (status $1), step $(steps)"
}

# if_preempted: a word if a more urgent job wants the nodes, of which only the steps have been told.
if_preempted() { [[ $(scontrol show job "$JOB") != *PreemptTime=[0-9]* ]] || echo ", preempted"; }

# requeue: go on in another attempt, unless too many have come to nothing.
requeue() {
    local idle
    idle=$(sed -n "s/.*\"job\": \"$JOB\".*\"from_step\": \([0-9]*\), \"to_step\": \([0-9]*\).*/\1 \2/p" "$RUN/attempts.jsonl" |
        awk '{ idle = $2 > $1 ? 0 : idle + 1 } END { print idle + 0 }')
    if ((idle > MAX_RESTARTS)); then
        say "not tried again: $idle attempts in a row have saved nothing, MAX_RESTARTS = $MAX_RESTARTS"
    else
        again
    fi
}

# again: end in favour of another attempt, if Slurm allows it.
again() {
    if scontrol requeue "$JOB"; then
        say "requeued"
        exit 0
    fi
    say "Slurm does not requeue this job; submit it again with run.resume=true"
}
