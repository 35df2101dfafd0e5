# For tests that root runs in a guest (tools/vm): a daemon, and words for failures. To be sourced by a script that sets
# `cowgate` (the program) before.
set -euo pipefail
# the system's own programs: a python3 that is a script of a version manager takes a second to start here
PATH=/usr/sbin:/usr/bin:/sbin:/bin:$PATH
dir=/run/test
port=10809
pid=

say() { printf -- '-- %s s: %s\n' "$SECONDS" "$*"; }
fail() {
    printf 'failed: %s\n' "$*"
    exit 1
}
ended() {
    local status=$?
    [ "$status" -eq 0 ] && return
    echo "failed with status $status in line ${BASH_LINENO[0]}; the daemon says:"
    cat "$dir/log"
    dmesg | tail -n 20
}
trap ended EXIT

# Waits until a command succeeds.
until_true() { # what, command
    local what=$1 tries
    shift
    for tries in $(seq 600); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.1
    done
    fail "waited too long for $what ($tries tries)"
}
equal() { [ "$2" = "$3" ] || fail "$1 is $2, not $3"; }
# md5sum, because the emulated processor is slow
digest() { md5sum <"$1" | cut -d ' ' -f 1; }

export_file() { # name, image, further lines
    printf '[%s]\nexportname = %s\n%b\n' "$1" "$2" "${3:-}" >"$dir/conf.d/$1.conf"
}
start() { # command that runs the daemon
    "$@" "$cowgate" serve -c "$dir/config" -p "$dir/pid" 2>>"$dir/log" &
    pid=$!
    until_true "the daemon" "$cowgate" status --control "$dir/control"
}
stop() {
    kill -TERM "$pid"
    wait "$pid" || fail "the daemon ended with $?"
}
reloads() { grep -c reloaded "$dir/log" || true; }
reload() {
    local before
    before=$(reloads)
    kill -HUP "$pid"
    # shellcheck disable=SC2016
    until_true "the reload" bash -c '[ "$(grep -c reloaded "$1")" -gt "$2" ]' - "$dir/log" "$before"
}

# Random writes, zeroes and trims below a file or device, each byte verified.
fio_verifies() { # file, size, block size
    fio --name=v --filename="$1" --size="$2" --rw=randwrite --bsrange="$3-64k" --ba="$3" --direct=1 --ioengine=libaio \
        --iodepth=16 --verify=crc32c --verify_fatal=1 --do_verify=1 --fsync=64 --verify_state_save=0 --minimal >"$dir/fio" ||
        { cat "$dir/fio"; fail "fio on $1"; }
}

# A configuration with exports in conf.d; TCP and a Unix socket.
configure() { # further lines for [generic]
    mkdir -p "$dir/conf.d"
    cat >"$dir/config" <<EOF
[generic]
listenaddr = 127.0.0.1
port = $port
unixsock = $dir/sock
duallisten = true
allowlist = true
includedir = $dir/conf.d
controlsock = $dir/control
${1:-}
EOF
}
