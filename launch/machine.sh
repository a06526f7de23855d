# shellcheck shell=bash
# Sourced by tpu_worker.sh and gpu.sh: the environment, and a run in the background, on the machine that trains.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/lib.sh
source "$root/launch/lib.sh"

# ---- the environment ----------------------------------------------------------------------------------------------

# A Python that jaxlora runs on and that can make a virtual environment; nothing where there is none.
fitting_python() {
    local candidate
    for candidate in python3.12 python3.13 python3.11 python3; do
        if command -v "$candidate" >/dev/null && "$candidate" -c \
            'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
}

# Makes the virtual environment VENV, unless it is there. Where the machine has no Python 3.11 to 3.13 (Ubuntu 22.04, as in
# tpu-ubuntu2204-base, has 3.10) uv fetches one: a single file in the home folder, without root and without waiting for the
# dpkg lock, which the automatic updates hold in a new VM's first minutes, as Ubuntu's deadsnakes packages would have to.
make_environment() { # VENV
    local venv=$1 python
    if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then return; fi
    python=$(fitting_python)
    if [[ $python ]]; then
        call "$python" -m venv --clear "$venv"
        return
    fi
    PATH=$HOME/.local/bin:$PATH
    if ! command -v uv >/dev/null; then
        say "no Python 3.11 to 3.13 here: fetching uv, which fetches one"
        call bash -c 'set -o pipefail; curl -LsSf https://astral.sh/uv/install.sh | sh'
    fi
    call uv venv --clear --seed --python 3.12 "$venv"
}

install_packages() { # VENV ACCELERATOR
    call "$1/bin/python" -m pip install --disable-pip-version-check -r "$root/requirements.txt" "jax[$2]"
}

# ---- a run in the background --------------------------------------------------------------------------------------
#
# Beside the run folder (which is jaxlora's own) and named after it: .log, .pid, and .starts, the count of supervise.sh.

ended() { # WORKDIR: whether its run has nothing left to do
    case $(run_status "$1") in
        finished | stopped_early | diverged) return 0 ;;
    esac
    return 1
}

run_status() { # WORKDIR: the status in its record, or nothing
    { grep -Eo '"status": *"[a-z_]+"' "$1/record.json" 2>/dev/null || true; } | head -n 1 | cut -d '"' -f 4
}

# The process that watches over the run, or nothing: a number left by another boot may belong to anybody.
supervisor() { # FILES
    local pid=""
    if [[ -s $1.pid ]]; then pid=$(<"$1.pid"); fi
    if [[ $pid ]] && ps -o args= -p "$pid" 2>/dev/null | grep -qF supervise.sh; then echo "$pid"; fi
}

start_run() { # WORKDIR FILES RESTARTS PAUSE COMMAND...
    local workdir=$1 files=$2 restarts=$3 pause=$4
    shift 4
    if ended "$workdir"; then
        say "$workdir: this run has ended ($(run_status "$workdir"))"
        return
    fi
    if [[ $(supervisor "$files") ]]; then
        say "$workdir: already running (process $(supervisor "$files")); its log is $files.log"
        return
    fi
    if [[ $dry_run == yes ]]; then
        printf '%s >>%s 2>&1 </dev/null &\n' \
            "$(quoted setsid nohup bash "$root/launch/supervise.sh" "$files.starts" "$restarts" "$pause" "$@")" "$(quoted "$files.log")"
        return
    fi
    mkdir -p "$(dirname "$workdir")"
    cd "$root" || fail "$root: cannot be entered"
    setsid nohup bash "$root/launch/supervise.sh" "$files.starts" "$restarts" "$pause" "$@" >>"$files.log" 2>&1 </dev/null &
    echo $! >"$files.pid"
    say "$workdir: started (process $!); its log is $files.log"
}

# The last lines, and what follows until the run ends or Ctrl-C; the run goes on without its reader.
follow_log() { # WORKDIR FILES
    local pid
    pid=$(supervisor "$2")
    if [[ $pid || $dry_run == yes ]]; then
        call tail -n 100 -F ${pid:+--pid="$pid"} "$2.log"
    elif [[ -e $2.log ]]; then
        tail -n 100 "$2.log"
        say "$1: not running"
    else
        fail "$2.log: no log yet; start the run first"
    fi
}

tell_status() { # WORKDIR FILES
    local pid doing="not running"
    pid=$(supervisor "$2")
    if [[ $pid ]]; then doing="running (process $pid)"; fi
    printf '%s: %s; its record says: %s\n' "$1" "$doing" "$(run_status "$1" | grep . || echo nothing yet)"
}

stop_run() { # WORKDIR FILES
    local pid
    pid=$(supervisor "$2")
    if [[ -z $pid ]]; then
        say "$1: not running"
        return
    fi
    call kill -TERM "$pid"
    say "$1: asked to save and leave (process $pid)"
}
