#!/usr/bin/env bash
# What tpu_vm.sh has every worker of a TPU VM do. Nobody needs to type it:
#
#   tpu_worker.sh install|run|log|status|stop --mount FOLDER (--nfs HOST:/SHARE | --disk | --scratch) [--format]
#                 [--workdir FOLDER] [--restarts N] [--dry-run] [--help] [-- TRAIN ARGUMENTS]
#
# install   mounts the storage, makes ~/jaxlora-venv with a Python of 3.11 to 3.13, installs jaxlora's requirements
# run       starts training in the background, unless it runs or has ended; a crash starts it again, up to N times
# log       follows the log of this worker
# status    says whether it runs, and what its record says
# stop      asks it to save and leave
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/machine.sh
source "$here/machine.sh"

venv=$HOME/jaxlora-venv
storage="" share="" mount="" format=no workdir="" restarts=3

# ---- storage ------------------------------------------------------------------------------------------------------

mount_storage() {
    if [[ $storage == scratch ]] || mountpoint -q "$mount"; then return; fi
    if [[ $storage == nfs ]]; then
        if ! command -v mount.nfs >/dev/null; then
            # A new VM updates itself at first and holds the lock.
            call sudo apt-get -o DPkg::Lock::Timeout=600 update -q
            call sudo apt-get -o DPkg::Lock::Timeout=600 install -q -y nfs-common
        fi
        call sudo mkdir -p "$mount"
        # hard: a server that is away for a moment is waited for, rather than a write lost.
        call sudo mount -t nfs -o hard "$share" "$mount"
    else
        local device
        device=$(data_disk)
        prepare_disk "$device"
        call sudo mkdir -p "$mount"
        call sudo mount -o discard,defaults "$device" "$mount"
    fi
    call sudo chmod 1777 "$mount" # a new share, or a new file system, belongs to root
}

# The one disk without partitions: the boot disk has some. Names differ (/dev/sdb, on v6e /dev/nvme0n2).
data_disk() {
    local name type disks=()
    while read -r name type; do
        if [[ $type == disk && $(lsblk -rno NAME "$name" | wc -l) -eq 1 ]]; then disks+=("$name"); fi
    done < <(lsblk -dprno NAME,TYPE)
    ((${#disks[@]} == 1)) || fail "${#disks[@]} disks without partitions, and --data-disk means one: ${disks[*]:-none}"
    echo "${disks[0]}"
}

prepare_disk() { # DEVICE
    local kind
    kind=$(sudo blkid -o value -s TYPE "$1" || true)
    if [[ $kind ]]; then return; fi
    # Never unasked: a disk that cannot be read for a moment must not lose the run.
    [[ $format == yes ]] || die "$1 has no file system. If the disk is new, add --format to install, this once."
    call sudo mkfs.ext4 -q -m 0 -E lazy_itable_init=0,lazy_journal_init=0,discard "$1"
}

# ---- the run ------------------------------------------------------------------------------------------------------

# Number of this worker in its slice, as JAX itself asks for it (jax/_src/clusters/cloud_tpu_cluster.py).
worker_number() {
    curl -sf -m 5 -H "Metadata-Flavor: Google" \
        http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number || echo 0
}

start() {
    local pause=10
    # On a pod, JAX finds the other workers by itself. They stop 60 s after one has died: earlier it could not come back.
    if [[ $storage == nfs ]]; then pause=90; fi
    mount_storage
    if [[ $storage == disk ]]; then export HF_HOME=$mount/huggingface; fi # not downloaded again after a preemption
    if [[ $storage == nfs ]]; then umask 000; fi # all workers write one checkpoint; their user ids need not agree
    [[ $dry_run == yes || -x $venv/bin/python ]] || die "$venv: there is no virtual environment; install first"
    rm -f "$files.starts"
    start_run "$workdir" "$files" "$restarts" "$pause" \
        "$venv/bin/python" -m jaxlora.train "$@" --workdir "$workdir"
}

# ---- the command line ---------------------------------------------------------------------------------------------

step=${1:---help}
shift || true
while (($#)); do
    case $1 in
        --help | -h) step=--help ;;
        --dry-run) dry_run=yes ;;
        --disk | --scratch) storage=${1#--} ;;
        --format) format=yes ;;
        --nfs | --mount | --workdir | --restarts)
            (($# >= 2)) || die "$1 needs a value"
            case $1 in
                --nfs) storage=nfs share=$2 ;;
                --mount) mount=$2 ;;
                --workdir) workdir=$2 ;;
                --restarts) restarts=$2 ;;
            esac
            shift
            ;;
        --)
            shift
            break
            ;;
        *) die "there is no option $1; see --help" ;;
    esac
    shift
done
if [[ $step == --help ]]; then
    usage
    exit
fi
[[ $storage && $mount ]] || die "give --mount FOLDER and one of --nfs HOST:/SHARE, --disk, --scratch"
check_count --restarts "$restarts"
[[ $step == install || $workdir ]] || die "$step needs --workdir FOLDER"
number=0
[[ $step == install ]] || number=$(worker_number)
files=$workdir
((number == 0)) || files=$workdir.worker-$number # they share the folder; worker 0's log is the run's

case $step in
    install)
        call rm -f "$HOME/jaxlora-installed"
        mount_storage
        make_environment "$venv"
        install_packages "$venv" tpu
        call touch "$HOME/jaxlora-installed" # the whole of it, for resume
        ;;
    run)
        check_train_arguments "$@"
        start "$@"
        ;;
    log) follow_log "$workdir" "$files" ;;
    status) tell_status "$workdir" "$files" ;;
    stop) stop_run "$workdir" "$files" ;;
    *) die "there is no command '$step'; there are install, run, log, status, stop" ;;
esac
