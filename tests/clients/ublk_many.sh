#!/usr/bin/env bash
# Run by tests/ublk_endurance.rs as root in a guest: two hundred exports become devices and go again by SIGHUP, round after
# round, and nothing stays.
# usage: ublk_many.sh COWGATE ROUNDS
set -euo pipefail
cowgate=$1 rounds=$2
# shellcheck source=tests/clients/guest.sh
. "$(dirname "$0")/guest.sh"
# shellcheck source=tests/clients/devices.sh
. "$(dirname "$0")/devices.sh"
count=200

entries() { find "$1" -mindepth 1 -maxdepth 1 2>/dev/null | wc -l; }
devices_are() { # number
    [ "$(entries /sys/class/ublk-char)" -eq "$1" ] && [ "$(entries "$names")" -eq "$1" ]
}
resident() { sed -n 's/^VmRSS:[^0-9]*\([0-9]*\) kB/\1/p' "/proc/$pid/status"; }
keeps_nothing() { [ "$(entries "/proc/$pid/task")" -le "$threads" ] && [ "$(entries "/proc/$pid/fd")" -le "$descriptors" ]; }

configure
for n in $(seq "$count"); do
    truncate -s $((n << 16)) "$dir/disk$n.raw"
done
qemu-img create -q -f qcow2 "$dir/disk.qcow2" 1M
modprobe ublk_drv
# else what is free in the heaps of threads looks like what was forgotten
export MALLOC_ARENA_MAX=1
start
threads=$(entries "/proc/$pid/task")
descriptors=$(entries "/proc/$pid/fd")
for round in $(seq "$rounds"); do
    for n in $(seq "$count"); do
        export_file "disk$n" "$dir/disk$n.raw" "ublk = true\nublkqueues = 1\nublkdepth = 8"
    done
    export_file "disk7" "$dir/disk.qcow2" "ublk = true"
    reload
    until_true "$count devices" devices_are "$count"
    say "round $round: they are there: $(entries "/proc/$pid/task") threads, $(entries "/proc/$pid/fd") descriptors, $(resident) kB"
    for n in 1 7 100 200; do
        appears "disk$n"
        head -c 4096 /dev/urandom >"$dir/written"
        dd if="$dir/written" of="$device" bs=4096 oflag=direct status=none
        cmp -n 4096 "$device" "$dir/written" || fail "disk$n holds something else"
    done
    rm "$dir"/conf.d/*
    reload
    until_true "the end of $count devices" devices_are 0
    until_true "threads and descriptors" keeps_nothing
    say "round $round: they have gone: $(resident) kB"
    [ "$round" -gt 1 ] || first=$(resident)
done
[ "$(resident)" -le $((first + first / 10)) ] || fail "the daemon had $first kB after the first round and has $(resident) kB"
stop
nothing_is_left
say "done"
echo "all is well"
