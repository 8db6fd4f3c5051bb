#!/usr/bin/env bash
# Requeue a job whose batch host is lost: watch.sh JOB HOST, in a step on other nodes of the job.
#
# train.sbatch asks for --no-kill, so that a lost serving node does not end the run. Slurm then takes
# every lost node out of the job and leaves the others to it; also the one that runs the script, of
# which nothing would be left but an allocation until its time limit.
set -uo pipefail
job=$1 host=$2
while sleep 30; do
    nodes=$(squeue --noheader --jobs="$job" --format=%N) && [ -n "$nodes" ] || continue # ask again
    scontrol show hostnames "$nodes" | grep --quiet --line-regexp --fixed-strings "$host" || {
        echo "[$(date '+%F %T')] $host is lost, and with it train.sbatch; job $job is requeued"
        scontrol requeue "$job"
    }
done
