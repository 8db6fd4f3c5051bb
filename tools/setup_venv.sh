#!/bin/sh
# Make the virtual environment for a machine without CUDA, or say in one line what is in the way.
#
#   PYTHON=python3.11 TORCH_INDEX=URL_OR_FOLDER sh tools/setup_venv.sh VENV
#
# VENV/.unfinished stands from the first byte to the last, VENV/.ready after it: an interrupted
# attempt is thrown away by the next one, and a folder with neither is somebody else's.
set -u
cd "$(dirname "$0")/.." || exit 1
VENV=${1:?usage: tools/setup_venv.sh VENV}
PYTHON=${PYTHON:-python3.11}
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
LOCK=requirements-cpu.lock
LOG=$VENV/setup.log
BIN=$VENV/bin
DISK=4000       # MB: 2.5 GB of environment, the rest is pip's cache
DOWNLOADS=1000  # MB that pip holds at a time

stop() {
    printf '%s\n' "$*" >&2
    exit 1
}

# What can be missing, in the order in which it would be missed.
check_machine() {
    [ "$(uname -s)" = Linux ] || stop "system = $(uname -s): must be Linux; use a container or a virtual machine"
    case $(uname -m) in
        x86_64 | aarch64) ;;
        *) stop "machine = $(uname -m): must be x86_64 or aarch64; sglang has no wheel for another" ;;
    esac
    libc=$(getconf GNU_LIBC_VERSION 2>/dev/null) || libc="none of GNU"
    oldest=$(printf '%s\n' "glibc 2.34" "$libc" | sort -V | head -n 1)
    { [ "${libc%% *}" = glibc ] && [ "$oldest" = "glibc 2.34" ]; } ||
        stop "C library = $libc: must be glibc 2.34 or newer, sglang's wheels need it; use a newer system (Debian 12, Ubuntu 22.04) or a container of one"
    case $PWD/$VENV in
        *:*) stop "folder = $PWD: must be without ':', a virtual environment cannot live there; move the checkout" ;;
    esac
    [ -e "$VENV/.ready" ] && return
    room "$PWD" $DISK "move the checkout"
    room "${TMPDIR:-/tmp}" $DOWNLOADS "set TMPDIR to a folder that has it"
}

# room FOLDER MEGABYTES OTHERWISE: stop unless that much is free.
room() {
    free=$(df -Pm "$1" | awk 'NR == 2 { print $4 }')
    [ "$free" -ge "$2" ] || stop "disk = $free MB free in $1: $2 MB are needed; make room or $3"
}

check_python() {
    get="install it (Debian 12: apt install python3.11-venv; elsewhere: uv python install 3.11, conda or pyenv)"
    found=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
        stop "PYTHON = $PYTHON: does not run; $get, or name one: make PYTHON=/path/to/python3.11"
    [ "$found" = 3.11 ] ||
        stop "PYTHON = $PYTHON: is Python $found, $LOCK holds wheels for 3.11; $get"
    for module in venv ensurepip ssl ctypes; do
        "$PYTHON" -c "import $module" 2>/dev/null ||
            stop "PYTHON = $PYTHON: has no module $module; Debian and Ubuntu: apt install python3.11-venv, elsewhere use a Python built with it"
    done
}

check_tools() {
    lscpu -p=CPU,Core,Socket,Node >/dev/null 2>&1 ||
        stop "lscpu: does not run, SGLang asks it for the cores; install util-linux, and mount /sys in a container or chroot"
}

# stage LABEL COMMAND...: run it with its output in the log, and say on one growing line that it goes on.
stage() {
    printf '  %-34s' "$1"
    shift
    began=$(date +%s)
    printf '\n== %s\n' "$*" >>"$LOG"
    from=$(wc -l <"$LOG")
    setsid "$@" >>"$LOG" 2>&1 &   # a session of its own: one signal ends it with its children
    child=$!
    trap 'kill -- -$child; echo; exit 130' HUP INT TERM
    ticks=0
    while kill -0 $child 2>/dev/null; do
        sleep 1
        ticks=$((ticks + 1))
        [ $((ticks % 10)) -ne 0 ] || printf .
    done
    trap - HUP INT TERM
    wait $child || { echo " no"; return 1; }
    printf ' %s s\n' $(($(date +%s) - began))
}

# What the log of the last stage says went wrong, short enough for a line.
reason() {
    error=$(tail -n "+$from" "$LOG" | grep '^ *ERROR: ' | tail -n 1)
    case $error in
        '' | *"ERROR: Exception:") error=$(tail -n 1 "$LOG") ;;
    esac
    printf '%s' "$error" | cut -c 1-300 | sed 's/^ *//'
}

# Without a network pip speaks of a distribution that does not exist.
fail() {
    remedy="run make again, if a download broke off"
    if tail -n "+$from" "$LOG" | grep -q "connection broken by"; then
        remedy="the index could not be reached: run make again when it can"
    fi
    stop "$VENV: $1: $(reason); $remedy; all output: $LOG"
}

# pip as the user has set it up but for what would lead it out of the environment or make it ask.
quiet_pip() {
    unset PIP_TARGET PIP_PREFIX PIP_ROOT PYTHONPATH PYTHONHOME
    export PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off
}

# Where pip looks by default comes first: a mirror may hold the build, and may be all that is reachable.
install_torch() {
    torch=$(grep '^torch==' $LOCK)
    stage "$torch" "$BIN/python" -m pip install --no-compile --no-deps "$torch" && return
    grep -q "No matching distribution found for torch==" "$LOG" || fail "$torch"
    if [ -d "$TORCH_INDEX" ]; then
        set -- --no-index --find-links "$TORCH_INDEX"
    else
        set -- --index-url "$TORCH_INDEX"
    fi
    stage "  not where pip looks: TORCH_INDEX" "$BIN/python" -m pip install --no-compile --no-deps "$torch" "$@" ||
        fail "TORCH_INDEX = $TORCH_INDEX"
}

# --no-deps: the lock is complete, and sglang's own pins would pull gigabytes of CUDA.
# setuptools first: with it here, what is built needs no build environment of its own.
# --no-compile: what is imported, a small part, is compiled at the end; all of it takes a minute.
install() {
    stage "virtual environment" "$PYTHON" -m venv "$VENV" || fail "virtual environment"
    install_torch
    setuptools=$(grep '^setuptools==' $LOCK)
    stage "$setuptools" "$BIN/python" -m pip install --no-compile --no-deps "$setuptools" || fail "$setuptools"
    stage "$(grep -c '==' $LOCK) packages" "$BIN/python" -m pip install --no-compile --no-deps --no-build-isolation --use-pep517 -r $LOCK ||
        fail "packages of $LOCK"
    stage "peergrad itself" "$BIN/python" -m pip install --no-compile --no-deps --no-build-isolation -e . || fail "peergrad itself"
}

# What a run imports is compiled once, here: uncompiled it takes the server 20 s longer and each rank
# 10 s, in every run where Python may not keep what it compiles. For want of it nothing fails.
compile_imported() {
    run="peergrad.build, transformers.models.qwen3.modeling_qwen3, torch.utils.tensorboard, matplotlib.pyplot"
    server="from peergrad.rollout.cpu_server import load; load()"
    # Two processes, which have a core each where there are two.
    stage "byte code" env PYTHONDONTWRITEBYTECODE= sh -c '"$0" -c "import $1" & "$0" -c "$2"; wait' \
        "$BIN/python" "$run" "$server" || :
}

# A build for CUDA comes without its libraries and ends in a traceback, or drags a GPU in.
check_torch() {
    cuda=$("$BIN/python" -c 'import torch; print(torch.version.cuda or torch.version.hip)' 2>>"$LOG") ||
        stop "$VENV: torch does not import: $(tail -n 1 "$LOG" | cut -c 1-300); rm -rf $VENV and make with TORCH_INDEX= a folder or index with the CPU build; all output: $LOG"
    [ "$cuda" = None ] ||
        stop "$VENV: torch is built for CUDA $cuda: must be the CPU build; rm -rf $VENV and make with TORCH_INDEX= a folder or index that has it"
}

check_machine
check_python
check_tools
quiet_pip
stamp=$(cat $LOCK pyproject.toml | cksum)
if [ "$stamp" = "$(cat "$VENV/.ready" 2>/dev/null)" ]; then
    touch "$VENV/.ready"   # only the files' times are new
    exit 0
fi
[ ! -L "$VENV" ] ||
    stop "$VENV: is a link to an environment that is not of this checkout; remove the link, or choose another: make VENV=.venv-cpu"
[ ! -e "$VENV/.unfinished" ] || rm -rf "$VENV"/*   # and not what says that it is unfinished
[ ! -e "$VENV" ] || [ -e "$VENV/.ready" ] || [ -e "$VENV/.unfinished" ] ||
    stop "$VENV: exists and was not made by make; move it away, or choose another: make VENV=.venv-cpu"
mkdir -p "$VENV" && touch "$VENV/.unfinished" && rm -f "$VENV/.ready" || exit 1
: >"$LOG"
echo "setting up $VENV (2.5 GB, a few minutes)"
install
check_torch
compile_imported
printf '%s\n' "$stamp" >"$VENV/.ready"
rm "$VENV/.unfinished"
