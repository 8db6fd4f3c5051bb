#!/usr/bin/env bash
# One node's part in a step of train.sbatch or eval.sbatch: task.sh trainer|servers|evaluation COMMAND...
#
# Slurm signals the first process of a task alone, which is this shell, and often more than once.
# The program gets one signal, since a second means impatience there:
#   trainer  USR1, train.sbatch's, or TERM, Slurm's: save and stop
#   evaluation  TERM, Slurm's: end
#   servers  USR1: end. Not TERM: scancel sends it to all steps at once, and a trainer that saves
#            what it has still needs its servers.
set -uo pipefail
role=$1
shift
ulimit -n "$(ulimit -Hn)"
# Compiled kernels are many small files, and locks: no task for a shared disk.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/triton-$UID}
if [ "$role" = trainer ]; then
    export PET_NODE_RANK=$SLURM_PROCID   # torchrun's --node-rank
fi

hand_on() {
    trap : USR1 TERM
    kill -s "$1" "$child"
}
trap : USR1 TERM   # until there is somebody to hand them on to
"$@" &
child=$!
case $role in
    trainer) trap 'hand_on USR1' USR1 TERM ;;
    evaluation) trap 'hand_on TERM' TERM ;;
    servers) trap 'hand_on TERM' USR1 ;;
esac
while kill -0 "$child" 2>/dev/null; do
    wait "$child"   # comes back for every signal
done
wait "$child"
