#!/usr/bin/env bash
# Trains on this machine's NVIDIA GPUs, in the background: launch/gpu.sh COMMAND OPTIONS [-- TRAIN ARGUMENTS]
#
#   install   makes a virtual environment with jaxlora's requirements and JAX for CUDA
#   run       starts python -m jaxlora.train; a crash starts it again, from its last checkpoint
#   log       follows the log; Ctrl-C leaves the run alone
#   status    says whether it runs, and what its record says
#   stop      asks it to save and leave, and takes it out of the crontab
#
#   --workdir FOLDER   the run's folder, for example runs/qwen7b; its log is FOLDER.log
#   --restarts N       how often a crashed run is started again, reboots included; default 3
#   --at-reboot        also starts it again when the machine has been rebooted (a line in your crontab, until it ends)
#   --venv FOLDER      default .venv
#   --cuda 13|12       default 13, which needs a driver of 580 or later; 12 needs 525
#   --dry-run          print the commands, run none
#   --help
#
# For example:
#
#   launch/gpu.sh install
#   launch/gpu.sh run --workdir runs/qwen7b --at-reboot -- --config configs/qwen7b.py
#   launch/gpu.sh log --workdir runs/qwen7b
#
# One process drives all GPUs; the mesh of the config says how they share the work (configs/qwen7b.py splits the base).
# What it costs: configs/qwen7b.py on eight H100 takes 1.6 s a step by the plan's estimate at 40 % of the GPUs' peak (1.1 s at
# 60 %): 3.6 (2.4) GPU hours for 1,000 steps; on eight A100 three times as long (docs/launch.md). For a config of your own:
#
#   python -m jaxlora.plan --config configs/qwen7b.py                # on the GPU machine itself
#   python -m jaxlora.plan --config configs/qwen7b.py --devices 8    # anywhere, for eight devices
set -euo pipefail
# shellcheck source=launch/machine.sh
source "$(dirname "$0")/machine.sh"

workdir="" restarts=3 at_reboot=no again=no venv=$root/.venv cuda=13

# ---- the machine --------------------------------------------------------------------------------------------------

check_driver() {
    local least=580 version
    if [[ $cuda == 12 ]]; then least=525; fi
    if [[ $again == yes ]]; then wait_for_driver; fi
    version=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || version=""
    [[ $version =~ ^([0-9]+) ]] || die "nvidia-smi finds no NVIDIA GPU here; install the driver (version $least or later) first"
    ((BASH_REMATCH[1] >= least)) ||
        die "the NVIDIA driver is $version, and CUDA $cuda needs $least or later; update it$([[ $cuda == 12 ]] || echo ', or give --cuda 12')"
}

# Cron may be there before the driver is.
wait_for_driver() {
    local attempt
    for ((attempt = 0; attempt < 30; attempt++)); do
        if nvidia-smi >/dev/null 2>&1; then return; fi
        sleep 10
    done
}

# ---- the crontab --------------------------------------------------------------------------------------------------

mark() { echo "# jaxlora $workdir"; }

# The crontab without this run's line.
other_lines() {
    crontab -l 2>/dev/null | mark=$(mark) awk \
        '{ mark = ENVIRON["mark"] } substr($0, length($0) - length(mark) + 1) != mark' || true
}

start_after_reboot() {
    local line
    line="@reboot $(quoted bash "$root/launch/gpu.sh" "$@") >>$(quoted "$workdir.log") 2>&1 $(mark)"
    line=${line//%/\\%} # a bare one would end the line for cron
    if [[ $dry_run == yes ]]; then
        printf '(crontab -l; echo %s) | crontab -\n' "$(quoted "$line")"
    else
        { other_lines && printf '%s\n' "$line"; } | crontab -
    fi
}

forget_reboot() {
    if [[ $dry_run == no ]] && crontab -l 2>/dev/null | grep -qF " $(mark)"; then other_lines | crontab -; fi
}

# ---- the commands -------------------------------------------------------------------------------------------------

install() {
    check_driver
    make_environment "$venv"
    install_packages "$venv" "cuda$cuda"
}

run() { # TRAIN ARGUMENTS
    check_driver
    [[ $dry_run == yes || -x $venv/bin/python ]] || die "$venv: there is no virtual environment; run launch/gpu.sh install first"
    if [[ $again == no ]]; then
        # A person's command counts its restarts afresh; cron's goes on counting.
        [[ $dry_run == yes ]] || rm -f "$workdir.starts"
    fi
    if ended "$workdir"; then
        forget_reboot
    elif [[ $at_reboot == yes ]]; then
        start_after_reboot run --again --workdir "$workdir" --restarts "$restarts" --venv "$venv" --cuda "$cuda" -- "$@"
    fi
    start_run "$workdir" "$workdir" "$restarts" 10 "$venv/bin/python" -m jaxlora.train "$@" --workdir "$workdir"
}

stop() {
    forget_reboot
    stop_run "$workdir" "$workdir"
}

# ---- the command line ---------------------------------------------------------------------------------------------

step=${1:---help}
shift || true
while (($#)); do
    if [[ $1 == --*=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    case $1 in
        --help | -h) step=--help ;;
        --dry-run) dry_run=yes ;;
        --at-reboot) at_reboot=yes ;;
        --again) again=yes ;;
        --workdir | --restarts | --venv | --cuda)
            (($# >= 2)) && [[ $2 != -- ]] || die "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift
            ;;
        --)
            shift
            break
            ;;
        *) die "there is no option '$1'; see --help" ;;
    esac
    shift
done

case $step in
    --help | -h | help)
        usage
        exit
        ;;
    install) ;;
    run | log | status | stop)
        [[ $workdir ]] || die "$step needs the run's folder, for example --workdir runs/qwen7b"
        [[ $workdir == /* ]] || workdir=$PWD/$workdir # cron starts elsewhere
        ;;
    *) die "there is no command '$step'; there are install, run, log, status, stop" ;;
esac
check_count --restarts "$restarts"
[[ $cuda == 12 || $cuda == 13 ]] || die "--cuda is '$cuda'; give 13 or 12"
[[ $venv == /* ]] || venv=$PWD/$venv

case $step in
    install) install ;;
    run)
        check_train_arguments "$@"
        run "$@"
        ;;
    log) follow_log "$workdir" "$workdir" ;;
    status) tell_status "$workdir" "$workdir" ;;
    stop) stop ;;
esac
