#!/usr/bin/env bash
# Run by tests/ublk_endurance.rs as root in a guest: fio writes a device with four queues while two NBD clients write the
# same image, one of them in the clusters of a further program on the device. All is read through the device and over NBD.
# usage: ublk_shared.sh COWGATE
set -euo pipefail
cowgate=$1
# shellcheck source=tests/clients/guest.sh
. "$(dirname "$0")/guest.sh"
# shellcheck source=tests/clients/devices.sh
. "$(dirname "$0")/devices.sh"
region=$((16 << 20))
size=$((7 * region))
uri="nbd+unix:///shared?socket=$dir/sock"

# fio in one region, or in several with a job for each; whoever verifies later says the same.
fio_in() { # first region, more
    local offset=$(($1 * region))
    shift
    fio --name=v "$@" --offset="$offset" --size="$region" --offset_increment="$region" --rw=randwrite --bsrange=4k-64k \
        --ba=4k --iodepth=16 --verify=crc32c --verify_fatal=1 --verify_state_save=0 --fsync=128 --minimal >"$dir/fio-$offset" 2>&1 ||
        { cat "$dir/fio-$offset"; fail "fio $*"; }
}
on_the_device=(--ioengine=libaio --direct=1 --filename)
over_nbd=(--ioengine=nbd --uri)

# How many of the export's clients, queues included, have written and are still there.
writers() {
    "$cowgate" export show shared --json --control "$dir/control" |
        /usr/bin/python3 -c 'import json, sys; print(sum(c["write"]["requests"] > 0 for c in json.load(sys.stdin)["current"]["clients"]))'
}
# the four queues, and one NBD client or both
all_write() { [ "$(writers)" -ge 5 ]; }

configure
qemu-img create -q -f qcow2 "$dir/base.qcow2" "$size"
qemu-io -f qcow2 -c "write -P 7 0 $size" "$dir/base.qcow2" >/dev/null
qemu-img create -q -f qcow2 -F qcow2 -b "$dir/base.qcow2" "$dir/shared.qcow2"
modprobe ublk_drv
export_file shared "$dir/shared.qcow2" "ublk = true\nublkqueues = 4"
start
appears shared

say "four queues and two NBD clients"
running=()
# a job on each processor, so that each queue has something to do
fio_in 0 "${on_the_device[@]}" "$device" --numjobs=4 --cpus_allowed=0-3 --cpus_allowed_policy=split --do_verify=1 &
running+=($!)
fio_in 4 "${over_nbd[@]}" "$uri" --do_verify=1 &
running+=($!)
neighbour() { # its door, the other, which blocks
    /usr/bin/python3 "$(dirname "$0")/neighbour.py" "$1" "$2" $((5 * region)) "$region" "$3" ||
        fail "the neighbour through $1"
}
neighbour "$uri" "$device" 0 &
running+=($!)
neighbour "$device" "$uri" 1 &
running+=($!)
until_true "the clients" all_write
for process in "${running[@]}"; do
    wait "$process" || fail "one of the writers"
done

say "each through the other's door"
fio_in 4 "${on_the_device[@]}" "$device" --verify_only=1
for job in 0 1 2 3; do
    # the seeds of jobs are those of their numbers
    fio_in "$job" "${over_nbd[@]}" "$uri" --verify_only=1
done
equal "what nobody wrote" "$(dd if="$device" bs=1M skip=$((6 * region >> 20)) iflag=direct status=none | tr -d '\007' | wc -c)" 0

say "the image"
dd if="$device" of="$dir/read.raw" bs=1M iflag=direct status=none
stop
qemu-img check -q -f qcow2 "$dir/shared.qcow2" || fail "qemu-img check"
qemu-img compare -q -f qcow2 -F raw "$dir/shared.qcow2" "$dir/read.raw" || fail "the image is not what the device was"
qemu-io -r -f qcow2 -c "read -P 7 0 $size" "$dir/base.qcow2" | grep 'verification failed' && fail "the base was written"
nothing_is_left
say "done"
echo "all is well"
