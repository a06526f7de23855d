# shellcheck shell=bash
# Sourced by the scripts beside it: what they all say, quote and check.

dry_run=no

# Ends the script with one line: the person's input is wrong (2), or something else is (1).
die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}
fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 1
}

say() { printf '== %s\n' "$*" >&2; }

# The comment at the head of the script is its help.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

# The arguments as they would have to be typed.
quoted() {
    local word line="" quote="'\\''"
    for word in "$@"; do
        case $word in
            '' | *[!A-Za-z0-9_./:=,@%+-]*) word=\'${word//\'/$quote}\' ;;
        esac
        line+="${line:+ }$word"
    done
    printf '%s' "$line"
}

# Runs a command; with --dry-run, prints it.
call() {
    if [[ $dry_run == yes ]]; then
        printf '%s\n' "$(quoted "$@")"
    else
        "$@"
    fi
}

check_count() { # OPTION VALUE
    [[ $2 =~ ^[0-9]{1,4}$ ]] || die "$1 is '$2'; give a whole number from 0 to 9999."
}

# What jaxlora.train is given: a config, and no --workdir, which these scripts give it.
check_train_arguments() {
    local word config=no
    for word in "$@"; do
        case $word in
            --config | --config=*) config=yes ;;
            --workdir | --workdir=*) die "give --workdir before the --, not after it." ;;
        esac
    done
    [[ $config == yes ]] || die "nothing to train: give -- --config FILE after the options, for example -- --config configs/qwen7b.py"
}
