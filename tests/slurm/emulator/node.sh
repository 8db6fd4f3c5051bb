#!/bin/bash
# Boot a node: called in the namespaces of head.sh, it calls itself in the node's own.
#   node.sh FOLDER NAME ADDRESS SHARED...
# A node has a host name, an address, /dev/shm and /tmp of its own, and no name service but
# /etc/hosts. SHARED: folders below /tmp that all nodes see.
set -euo pipefail
folder=$1 name=$2 address=$3

if [ -z "${INSIDE:-}" ]; then
    if [ ! -e "/run/netns/$name" ]; then
        ip netns add "$name"
        ip link add "$name" type veth peer name eth0 netns "$name"
        ip link set "$name" master bridge up
        ip -n "$name" addr add "$address/24" dev eth0
        ip -n "$name" link set lo up
    fi
    ip -n "$name" link set eth0 up
    INSIDE=1 exec nsenter --net="/run/netns/$name" unshare --uts --mount --ipc --pid --fork \
        --kill-child --mount-proc bash "$0" "$@"
fi

unset INSIDE
hostname "$name"
mount --bind "$folder/etc/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mkdir /dev/shm/all
mount --bind / /dev/shm/all
mount -t tmpfs -o mode=1777 tmpfs /tmp
for shared in "$folder" "${@:4}"; do
    [[ $shared == /tmp/* ]] || continue
    mkdir -p "$shared"
    mount --bind "/dev/shm/all$shared" "$shared"
done
umount -l /dev/shm/all
rmdir /dev/shm/all
mkdir -p "$folder/spool/$name"
slurmd -D -N "$name" &
trap : TERM INT HUP
while :; do   # it adopts orphans
    wait
    sleep 0.2
done
