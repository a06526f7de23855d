#!/usr/bin/env bash
# Trains on a Cloud TPU VM, one host or a pod, from your own machine: launch/tpu_vm.sh COMMAND OPTIONS [-- TRAIN ARGUMENTS]
#
#   create    makes the VM (or, with --queued, asks for it and waits until it is there)
#   install   copies this checkout to every worker, mounts the storage, installs Python and the requirements
#   run       starts python -m jaxlora.train on every worker, in the background; it goes on when you leave
#   log       follows worker 0's log; Ctrl-C leaves the run alone
#   status    state of the VM, and of the run on every worker
#   stop      asks the run to save and leave
#   resume    if the VM was preempted: delete, create, install, run; if it is there: run. The run goes on where it was
#   delete    deletes the VM; the disk or share with the run stays
#
# Every command takes all options, so that one line does for all of them but for its first word:
#
#   --name NAME           the VM's
#   --zone ZONE           for example us-west4-a
#   --project PROJECT     default: gcloud's own
#   --type TYPE           v5litepod-N and v6e-N (N chips), v5p-N and v4-N (N cores, two a chip)
#   --runtime VERSION     default: the one that Cloud TPU's documentation names for the type
#   --spot                cheaper, and may be taken away: see resume
#   --queued              as a queued resource, which waits for capacity
#   --network NETWORK     default: default; an NFS share is reached from its own network alone
#
# The run folder lies on storage that outlives the VM and that all hosts see:
#
#   --data-disk DISK      one host: an existing disk of the zone, by name (with --project) or
#                         projects/P/zones/Z/disks/D (v6e takes Hyperdisk Balanced, the others Balanced Persistent Disk)
#   --format              put a file system on it, if it has none; for the first install on a new disk
#   --nfs HOST:/SHARE     one host or a pod: an NFS share, such as Filestore's
#   --scratch             one host, for a trial: the boot disk, which dies with the VM
#   --mount FOLDER        where it is mounted; default /mnt/jaxlora
#   --workdir FOLDER      the run's folder in there, for example runs/qwen7b
#
#   --restarts N          how often a crashed run is started again; default 3
#   --dry-run             print the commands, run none
#   --help
#
# For example, with VM="--name jl --zone us-west4-a --project P --type v5litepod-8 --spot --queued --data-disk runs":
#
#   gcloud compute disks create runs --zone us-west4-a --project P --size 200GB --type pd-balanced
#   launch/tpu_vm.sh create  $VM --workdir runs/qwen7b -- --config configs/qwen7b.py
#   launch/tpu_vm.sh install $VM --format
#   launch/tpu_vm.sh run     $VM --workdir runs/qwen7b -- --config configs/qwen7b.py
#   launch/tpu_vm.sh log     $VM --workdir runs/qwen7b
#   launch/tpu_vm.sh resume  $VM --workdir runs/qwen7b -- --config configs/qwen7b.py
#   launch/tpu_vm.sh delete  $VM
#
# What it costs: configs/qwen7b.py takes 8 chips of v5litepod-8, 4.1 of the 16.9 GB of each, and by the plan's estimate 8.2 s
# a step at 40 % of the chips' peak (5.5 s at 60 %): 18 (12) chip hours for 1,000 steps. Other types: docs/launch.md. For a
# config of your own, before anything is paid for (needs no TPU); v5litepod-8 is v5e:2x4:
#
#   python -m jaxlora.plan --config configs/qwen7b.py --topology v5e:2x4
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=launch/lib.sh
source "$here/lib.sh"

name="" zone="" project="" type="" runtime="" spot=no queued=no network=""
storage="" disk="" share="" mount=/mnt/jaxlora format=no workdir="" restarts=3
train=()

# ---- what the options come to -------------------------------------------------------------------------------------

# Sets chips, pod (whether it has several hosts), topology (as jaxlora.plan has it) and runtime from the type.
# Runtimes: cloud.google.com/tpu/docs/runtimes. Sizes and hosts: each generation's page, such as cloud.google.com/tpu/docs/v5e.
read_type() {
    local kind="" size="" shapes="" on_host version
    if [[ $type =~ ^(v5litepod|v6e|v5p|v4)-([1-9][0-9]*)$ ]]; then
        kind=${BASH_REMATCH[1]} size=${BASH_REMATCH[2]}
    fi
    local flat="1:1x1 4:2x2 8:2x4 16:4x4 32:4x8 64:8x8 128:8x16 256:16x16"
    local deep="8:2x2x1 16:2x2x2 32:2x2x4 64:2x4x4 128:4x4x4 256:4x4x8 512:4x8x8 1024:8x8x8"
    case $kind in
        v5litepod) shapes=$flat chips=$size on_host=8 version=v2-alpha-tpuv5-lite ;;
        v6e) shapes=$flat chips=$size on_host=8 version=v2-alpha-tpuv6e ;;
        v5p) shapes=$deep chips=$((size / 2)) on_host=4 version=v2-alpha-tpuv5 ;;
        v4) shapes=$deep chips=$((size / 2)) on_host=4 version=tpu-ubuntu2204-base ;;
        *) die "--type '$type': there is no such type; give v5litepod-N or v6e-N (N chips), v5p-N or v4-N (N cores), for example v5litepod-8" ;;
    esac
    [[ " $shapes " =~ " $size:"([0-9x]+)" " ]] ||
        die "--type $type: there is no $kind of that size; sizes are $(tr ' ' '\n' <<<"$shapes" | cut -d : -f 1 | paste -sd ' ' -)"
    topology=${kind/litepod/e}:${BASH_REMATCH[1]}
    pod=no
    if ((chips > on_host)); then pod=yes; fi
    runtime=${runtime:-$version}
}

config() { # of the training arguments
    local word previous=""
    for word in ${train[@]+"${train[@]}"}; do
        if [[ $word == --config=* ]]; then word=${word#*=} previous=--config; fi
        if [[ $previous == --config ]]; then
            echo "$word"
            return
        fi
        previous=$word
    done
    echo configs/qwen7b.py
}

check() { # COMMAND: everything that it needs, before anything is done
    [[ $name =~ ^[a-z]([a-z0-9-]{0,60}[a-z0-9])?$ ]] ||
        die "--name '$name': give lower-case letters, digits and hyphens, a letter first, for example --name jaxlora"
    [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || die "--zone '$zone': give a zone, for example --zone us-west4-a"
    where=("--zone=$zone")
    if [[ $project ]]; then where+=("--project=$project"); fi
    check_count --restarts "$restarts"
    case $1 in create | install | run | resume) check_type_and_storage ;; esac
    case $1 in run | log | status | stop | resume) check_workdir ;; esac
    case $1 in run | resume) check_train_arguments ${train[@]+"${train[@]}"} ;; esac
}

check_type_and_storage() {
    read_type
    [[ $mount =~ ^/[A-Za-z0-9_./-]+$ ]] || die "--mount '$mount': give an absolute folder, for example /mnt/jaxlora"
    case $storage in
        nfs) [[ $share =~ ^[A-Za-z0-9.-]+:/[^[:space:]]*$ ]] || die "--nfs '$share': give HOST:/SHARE, for example 10.0.0.2:/jaxlora" ;;
        disk | scratch)
            [[ $pod == no ]] ||
                die "--type $type has several hosts, and all of them write the run's folder: give --nfs HOST:/SHARE instead of --${storage/#disk/data-disk}"
            ;;
        *) die "the run's folder would die with the VM: give --data-disk DISK, --nfs HOST:/SHARE, or, for a trial, --scratch" ;;
    esac
    if [[ $storage == disk && $disk != projects/*/disks/* ]]; then
        [[ $disk != */* ]] || die "--data-disk '$disk': give a name, or projects/P/zones/Z/disks/D"
        [[ $project ]] || die "--data-disk $disk needs --project, or give projects/P/zones/Z/disks/D"
        disk=projects/$project/zones/$zone/disks/$disk
    fi
}

check_workdir() {
    [[ $workdir =~ ^[A-Za-z0-9_][A-Za-z0-9_./-]*$ && $workdir != *..* ]] ||
        die "--workdir '$workdir': give the run's folder within --mount, for example --workdir runs/qwen7b"
    [[ $storage ]] || die "say where the run's folder lies: --data-disk DISK, --nfs HOST:/SHARE or --scratch, as for create"
}

# ---- gcloud -------------------------------------------------------------------------------------------------------

tpu() { call gcloud compute tpus tpu-vm "$@" "${where[@]}"; }
queue() { call gcloud compute tpus queued-resources "$@" "${where[@]}"; }

on_worker() { # WHICH COMMAND...: on one worker, or on all
    local which=$1
    shift
    tpu ssh "$name" "--worker=$which" "--command=$(quoted "$@")"
}

# tpu_worker.sh's command on one worker, or on all.
work() { # WHICH COMMAND [ARGUMENTS]
    local which=$1 step=$2 stored=(--mount "$mount")
    shift 2
    case $storage in
        nfs) stored+=(--nfs "$share") ;;
        disk) stored+=(--disk) ;;
        scratch) stored+=(--scratch) ;;
    esac
    on_worker "$which" bash jaxlora/launch/tpu_worker.sh "$step" "${stored[@]}" "$@"
}

# READY, PREEMPTED, ... as gcloud says it; ABSENT where there is no such VM.
state() { # tpu-vm|queued-resources
    local field=state answer
    if [[ $1 == queued-resources ]]; then field=state.state; fi
    if answer=$(gcloud compute tpus "$1" describe "$name" "${where[@]}" "--format=value($field)" 2>&1); then
        echo "$answer" | tail -n 1
    elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
        echo ABSENT
    else
        fail "$answer"
    fi
}

# ---- the commands -------------------------------------------------------------------------------------------------

create() {
    local arguments=("--accelerator-type=$type")
    if [[ $spot == yes ]]; then arguments+=(--spot); fi
    if [[ $storage == disk ]]; then arguments+=("--data-disk=source=$disk,mode=read-write"); fi
    if [[ $network ]]; then arguments+=("--network=$network"); fi
    say "$type: $chips chips. What they do and how long they take: python -m jaxlora.plan --config $(config) --topology $topology"
    if [[ $queued == yes ]]; then
        queue create "$name" "--node-id=$name" "${arguments[@]}" "--runtime-version=$runtime"
        wait_in_queue
    else
        tpu create "$name" "${arguments[@]}" "--version=$runtime"
    fi
}

wait_in_queue() {
    local now
    if [[ $dry_run == yes ]]; then
        call gcloud compute tpus queued-resources describe "$name" "${where[@]}" "--format=value(state.state)"
        return
    fi
    say "waiting for capacity; Ctrl-C leaves the request in the queue (delete takes it out)"
    SECONDS=0
    while true; do
        now=$(state queued-resources)
        case $now in
            ACTIVE) return ;;
            FAILED | SUSPENDED | SUSPENDING | DELETING | ABSENT)
                fail "the request is $now; see gcloud compute tpus queued-resources describe $name ${where[*]}"
                ;;
        esac
        say "$now for $((SECONDS / 60)) min $((SECONDS % 60)) s"
        sleep 30
    done
}

# A new VM refuses connections until its SSH server runs and has the key.
wait_for_ssh() {
    local attempt
    for attempt in 1 2 3 4 5 6 7 8 9 10; do
        if on_worker all true; then return; fi
        say "no connection to all workers yet (attempt $attempt of 10)"
        sleep 15
    done
    fail "no connection to the workers of $name; see gcloud compute tpus tpu-vm ssh $name ${where[*]} --dry-run"
}

install() {
    local archive=jaxlora.tgz
    wait_for_ssh
    if [[ $dry_run == no ]]; then
        scratch=$(mktemp -d)
        trap 'rm -rf "$scratch"' EXIT
        archive=$scratch/jaxlora.tgz
    fi
    # With ./ before it: jaxlora/runs is source code, and stays.
    call tar -czf "$archive" -C "$(dirname "$here")" --exclude=.git --exclude=.venv --exclude=__pycache__ --exclude='.*_cache' \
        --exclude=./runs --exclude=./jaxlora.tgz .
    say "copying $archive to every worker"
    tpu scp "$archive" "$name:jaxlora.tgz" --worker=all
    on_worker all bash -c 'rm -rf jaxlora && mkdir jaxlora && tar -xzf jaxlora.tgz -C jaxlora'
    if [[ $format == yes ]]; then work all install --format; else work all install; fi
}

log() { work 0 log --workdir "$mount/$workdir"; }

stop() { work all stop --workdir "$mount/$workdir"; }

status() {
    local now=READY
    if [[ $dry_run == yes ]]; then
        call gcloud compute tpus tpu-vm describe "$name" "${where[@]}" "--format=value(state)"
    else
        now=$(state tpu-vm)
        echo "$name: $now"
    fi
    if [[ $now == READY ]]; then work all status --workdir "$mount/$workdir"; fi
}

run() { work all run --workdir "$mount/$workdir" --restarts "$restarts" -- "${train[@]}"; }

delete() {
    # A queued resource owns its VM: --force deletes both.
    if [[ $queued == yes ]]; then
        queue delete "$name" --force --quiet
    else
        tpu delete "$name" --quiet
    fi
}

# There is no VM. With --queued the request may still wait, and keeps its place; or it ended, and still holds the name.
come_back() {
    local request=ABSENT
    if [[ $queued == yes ]]; then request=$(state queued-resources); fi
    case $request in
        ABSENT) create ;;
        FAILED | SUSPENDED)
            delete
            create
            ;;
        *) wait_in_queue ;;
    esac
}

resume() {
    local now=PREEMPTED
    if [[ $dry_run == yes ]]; then
        call gcloud compute tpus tpu-vm describe "$name" "${where[@]}" "--format=value(state)"
        say "if that says PREEMPTED or TERMINATED:"
    else
        now=$(state tpu-vm)
        say "$name is $now"
    fi
    case $now in
        READY) if ! on_worker all test -e jaxlora-installed; then install; fi ;; # an earlier resume may have been cut off
        PREEMPTED | TERMINATED)
            delete
            create
            install
            ;;
        ABSENT)
            come_back
            install
            ;;
        *) fail "$name is $now: nothing done; try again when it is READY, PREEMPTED or TERMINATED" ;;
    esac
    run
}

# ---- the command line ---------------------------------------------------------------------------------------------

step=${1:---help}
shift || true
while (($#)); do
    if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case $1 in
        --help | -h) step=--help ;;
        --dry-run) dry_run=yes ;;
        --spot) spot=yes ;;
        --queued) queued=yes ;;
        --format) format=yes ;;
        --scratch) storage=scratch ;;
        --name | --zone | --project | --type | --runtime | --network | --data-disk | --nfs | --mount | --workdir | --restarts)
            (($# >= 2)) && [[ $2 != -- ]] || die "$1 needs a value"
            case $1 in
                --data-disk) storage=disk disk=$2 ;;
                --nfs) storage=nfs share=$2 ;;
                *) printf -v "${1#--}" %s "$2" ;;
            esac
            shift
            ;;
        --)
            shift
            train=("$@")
            break
            ;;
        *) die "there is no option '$1'; see --help" ;;
    esac
    shift
done

case $step in
    --help | -h | help) usage ;;
    create | install | run | log | status | stop | resume | delete)
        check "$step"
        "$step"
        ;;
    *) die "there is no command '$step'; there are create, install, run, log, status, stop, resume, delete" ;;
esac
