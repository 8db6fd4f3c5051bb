#!/bin/bash
# The first process of the cluster, in namespaces of its own: its network, munge and slurmctld.
#   head.sh FOLDER CONTROLLER
# It lives until its standard input ends. With it the kernel ends everything in its pid namespace,
# nodes and jobs too, and so all that is in the other namespaces.
set -euo pipefail
folder=$1 controller=$2
hostname head
mount -t tmpfs tmpfs /run   # what ip remembers here is gone with this mount
mkdir /run/netns
mount --bind "$folder/etc/hosts" /etc/hosts
ip link set lo up
ip link add bridge type bridge
ip addr add "$controller/24" dev bridge
ip link set bridge up
# --force: nobody else need enter a folder of tests, which is what it complains of.
munged --foreground --force --key-file="$folder/etc/munge.key" --socket="$folder/run/munge.sock" \
    --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" \
    --seed-file="$folder/run/munge.seed" --num-threads=2 &
until [ -S "$folder/run/munge.sock" ]; do sleep 0.05; done
slurmctld -D &
cat >/dev/null
