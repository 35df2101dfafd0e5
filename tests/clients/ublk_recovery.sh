#!/usr/bin/env bash
# Run by tests/ublk.rs as root in a guest: a daemon that is killed, or gives its devices to the next one, while they are in
# use, and the next one, which goes on with them; devices that get another size meanwhile.
# usage: ublk_recovery.sh COWGATE ROUNDS
set -euo pipefail
cowgate=$1 rounds=$2
# shellcheck source=tests/clients/guest.sh
. "$(dirname "$0")/guest.sh"
# shellcheck source=tests/clients/devices.sh
. "$(dirname "$0")/devices.sh"
left=/run/cowgate/devices

die() {
    kill -9 "$pid"
    wait "$pid" 2>/dev/null || true
}
# Linux 6.12 may crash itself when whoever serves a busy device ends: kernel-notes/2026-11-23-ublk.md
can_hold_still() { "$cowgate" ublk list | grep '^driver:' | grep -qw QUIESCE; }
pause() {
    can_hold_still && return
    pkill -STOP -x 'fio|cp' || true
    sync -f /mnt
    sleep 0.2
}
goes_on() { pkill -CONT -x 'fio|cp' || true; }
hands_over() {
    kill -USR2 "$pid"
    wait "$pid" || fail "the daemon ended with status $?"
}
said() { grep -q "$1" "$dir/log"; }
# How often a daemon has gone on with a device.
times_again() { grep -c "is again $1" "$dir/log"; }
is_again() { [ "$(times_again "$1")" -gt "$2" ]; } # device, how often before
image_is_good() { qemu-img check -q -f qcow2 "$1" || fail "qemu-img check $1: $(qemu-img check -f qcow2 "$1" 2>&1)"; }

configure ''
modprobe ublk_drv
qemu-img create -q -f qcow2 "$dir/base.qcow2" 200M
qemu-io -f qcow2 -c "write -P 7 0 100M" "$dir/base.qcow2" >/dev/null
for name in bare files gone foreign; do
    qemu-img create -q -f qcow2 -F qcow2 -b "$dir/base.qcow2" "$dir/$name.qcow2"
    export_file "$name" "$dir/$name.qcow2" "ublk = true\nublkqueues = 2"
done
truncate -s 64M "$dir/raw.raw"
export_file raw "$dir/raw.raw" "ublk = true"
# one request at a time: a daemon that holds the device still has all of them
truncate -s 64M "$dir/narrow.raw"
export_file narrow "$dir/narrow.raw" "ublk = true\nublkqueues = 1\nublkdepth = 1"
# while somebody else reads its image
export_file reader "$dir/base.qcow2" "ublk = true\nreadonly = true\nublkqueues = 1"
start

say "loads: verified writes on a QCOW2 and a raw device, files on another"
appears bare
bare=$device
appears raw
raw=$device
appears narrow
narrow=$device
appears reader
reader=$device
exec 9<"$reader"
qemu-io -r -f qcow2 "$dir/base.qcow2" -c "sleep 1000000" >/dev/null &
other_reader=$!
appears files
files=$device
mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 "$files"
mount "$files" /mnt
# until there were enough rounds: written in part over what there is, read back at once and once more at the end
verify() { # device, size
    local runs=0
    until [ -e "$dir/enough" ]; do
        fio --name=v --filename="$1" --size="$2" --rw=randwrite --bsrange=4k-64k --ba=4k --direct=1 --ioengine=libaio \
            --iodepth=8 --verify=crc32c --verify_fatal=1 --verify_backlog=32 --do_verify=1 --fsync=128 \
            --randrepeat=0 --verify_state_save=0 --minimal >"$dir/fio-$3" 2>&1 || return 1
        [ "$3" != bare ] || blkdiscard -o $((100 << 20)) -l $((20 << 20)) "$1"
        runs=$((runs + 1))
    done
    echo "$runs" >"$dir/runs-$3"
}
copy() {
    local n=0 old
    until [ -e "$dir/enough" ]; do
        n=$((n + 1))
        cp -r "$(dirname "$0")/../../src" "/mnt/$n"
        [ $((n % 2)) -eq 0 ] || sync /mnt
        old=/mnt/$((n - 3))
        [ ! -e "$old" ] || rm -r "$old"
    done
    echo "$n" >"$dir/runs-files"
}
verify "$bare" 96M bare & loads=($!)
verify "$raw" 24M raw & loads+=($!)
verify "$narrow" 4M narrow & loads+=($!)
copy & loads+=($!)

loads_go_on() { # after what
    local load
    for load in "${loads[@]}"; do
        kill -0 "$load" 2>/dev/null || { cat "$dir"/fio-*; fail "a load has ended: $1"; }
    done
}
for round in $(seq "$rounds"); do
    [ -z "${COWGATE_DEBUG:-}" ] || say "round $round"
    sleep "0.$((RANDOM % 8 + 1))"
    pause
    if [ $((round % 2)) -eq 0 ]; then hands_over; else die; fi
    start
    goes_on
    loads_go_on "round $round"
done

say "another size"
bytes() { blockdev --getsize64 "$1"; }
resize() { "$cowgate" export resize --control "$dir/control" "$@"; }
refuses() { # words, export, size
    local words=$1 size
    shift
    size=$(bytes "$names/$1")
    resize "$@" >"$dir/refused" 2>&1 && fail "it is not refused: resize $*"
    grep -q "$words" "$dir/refused" || fail "it does not say \"$words\" but: $(cat "$dir/refused")"
    equal "the size of $1" "$(bytes "$names/$1")" "$size"
}
if can_hold_still; then
    resize files 300M | grep -q '300 MiB' || fail "it does not say the new size"
    equal "the size of files" "$(bytes "$files")" $((300 << 20))
    resize2fs "$files" >"$dir/resize2fs" 2>&1 || { cat "$dir/resize2fs"; fail "resize2fs"; }
    resize files +4M >/dev/null
    equal "the size of files" "$(bytes "$files")" $((304 << 20))
    for n in 1 2 3 4 5 6 7 8; do resize narrow +1M >/dev/null; done
    equal "the size of narrow" "$(bytes "$narrow")" $((72 << 20))
    truncate -s 80M "$dir/raw.raw"
    resize raw >/dev/null
    equal "the size of raw" "$(bytes "$raw")" $((80 << 20))
    # the image may be somebody else's at the moment that it is let go: then its device and who uses it wait
    until [ -e "$dir/sized" ]; do qemu-io -f qcow2 "$dir/files.qcow2" -c "sleep 200" >/dev/null 2>&1 || true; done &
    other=$!
    for n in 1 2 3 4 5 6 7 8; do
        resize files +1M >/dev/null 2>"$dir/refused" || grep -q "in use" "$dir/refused" || fail "$(cat "$dir/refused")"
    done
    touch "$dir/sized"
    wait "$other"
    loads_go_on "sizes beside another program"
    refuses "smaller" files 100M
    loads_go_on "a refused size"
    qemu-io -r -f raw "nbd+unix:///bare?socket=$dir/sock" -c "sleep 100000" >/dev/null &
    client=$!
    has_three() { [ "$("$cowgate" export list --control "$dir/control" | awk '$1 == "bare" { print $5 }')" -eq 3 ]; }
    until_true "the client" has_three
    refuses "other clients" bare 300M
    kill "$client"
else
    refuses "held still" files 300M
fi
resize nothing 300M 2>"$dir/refused" && fail "it finds what is not there"
grep -q "no export" "$dir/refused" || fail "it says $(cat "$dir/refused")"
loads_go_on "another size"
pause
die
start
goes_on
touch "$dir/enough"
for load in "${loads[@]}"; do
    wait "$load" || { cat "$dir"/fio-*; fail "a load has failed"; }
done
say "$rounds rounds; runs: bare $(cat "$dir/runs-bare"), raw $(cat "$dir/runs-raw"), copies $(cat "$dir/runs-files")"
equal "the device" "$(readlink -f "$names/bare")" "$bare"
# of the disk, not of the page cache
echo 3 >/proc/sys/vm/drop_caches
last=$(cat "$dir/runs-files")
diff -r "$(dirname "$0")/../../src" "/mnt/$last" || fail "files have changed"
umount /mnt
e2fsck -fn "$files" >"$dir/fsck" 2>&1 || { cat "$dir/fsck"; fail "the file system is broken"; }
grep -E "cannot be gone on|panicked" "$dir/log" && fail "the log complains"
kill "$other_reader"
equal "the read-only device" "$(dd bs=4k count=1 iflag=direct status=none <&9 | od -An -tx1 | head -n 1 | tr -d ' \n')" 07070707070707070707070707070707
exec 9<&-
[ "$(grep -c 'is again /dev' "$dir/log")" -ge $((rounds * 7)) ] || fail "not every device was gone on with"

say "an export that has gone, and an image that somebody else has changed"
appears gone
gone=$device
appears foreign
foreign=$device
exec 7<"$gone" 8<"$foreign"
# not flushed: only the journal knows
dd if=/dev/urandom of="$foreign" bs=64k count=64 seek=1600 oflag=direct status=none
die
rm "$dir/conf.d/gone.conf"
qemu-io -f qcow2 -c "write -P 5 10M 8M" "$dir/foreign.qcow2" >/dev/null
start
said 'export "gone": its device cannot be gone on with: the configuration has no such device' || fail "nothing is said of gone"
said 'export "foreign": its device cannot be gone on with: .*another program has changed it' || fail "nothing is said of foreign"
[ ! -e "$gone" ] || fail "the device of an export that has gone is there"
[ ! -L "$names/gone" ] || fail "its name leads to $(readlink "$names/gone")"
equal "what the old device still reads" "$(dd bs=4k count=1 iflag=direct status=none <&8 2>/dev/null | wc -c)" 0
exec 7<&- 8<&-
appears bare
equal "what the other program wrote" "$(qemu-io -U -r -f qcow2 -c 'read -P 5 10M 8M' "$dir/foreign.qcow2" | grep -c 'verification failed')" 0

say "two devices of one image, and another definition"
export_file twin "$dir/foreign.qcow2" "ublk = true\nublkqueues = 1"
reload
appears twin
exec 7<"$device" 8<"$raw"
dd if=/dev/urandom of="$dir/pattern" bs=64k count=16 status=none
dd if="$dir/pattern" of="$device" bs=64k seek=1000 oflag=direct status=none
twin=$device
die
rm "$dir/conf.d/foreign.conf"
export_file narrow "$dir/narrow.raw" "ublk = true\nublkqueues = 1\nfilesize = 1048576"
export_file raw "$dir/raw.raw" "ublk = true\nublkdepth = 8"
start
until_true "the twin, after the end of the daemon" said "is again $twin"
cmp "$dir/pattern" <(dd if="$twin" bs=64k skip=1000 count=16 iflag=direct status=none) || fail "what was answered is lost"
said 'export "narrow": its device cannot be gone on with: the configuration has something else under its name' || fail "nothing is said of narrow"
until_true "the new device" test -b "$names/narrow"
equal "its size" "$(bytes "$names/narrow")" $((1 << 20))
# what a file with errors may have defined waits until they are mended
die
mv "$dir/conf.d/twin.conf" "$dir/twin.conf"
printf '[twin]\nno line of a configuration\n' >"$dir/conf.d/twin.conf"
start
said 'export "twin": its device and who uses it wait' || fail "nothing is said of the twin"
before=$(times_again "$twin")
mv "$dir/twin.conf" "$dir/conf.d/twin.conf"
reload
until_true "the twin" is_again "$twin" "$before"
cmp "$dir/pattern" <(dd if="$twin" bs=64k skip=1000 count=16 iflag=direct status=none) || fail "what was answered is lost"
# another depth takes another device, which comes when nobody uses the one there is
equal "the device that is used" "$(readlink -f "$names/raw")" "$raw"
depth_is() { [ "$(cat "/sys/block/$(basename "$(readlink -f "$names/raw")")/queue/nr_requests")" -eq "$1" ]; }
equal "what it reads" "$(dd bs=4k count=1 iflag=direct status=none <&8 | wc -c)" 4096
exec 7<&- 8<&-
until_true "the device of another depth" depth_is 8

say "an image that somebody else has for a while, and a reload meanwhile"
raw=$(readlink -f "$names/raw")
exec 7<"$raw"
die
# as QEMU says in its locks that nobody else may write: byte 201 is of those who do not share that
python3 - "$dir/raw.raw" "$dir/locked" <<'EOF' &
import fcntl, sys, time
image = open(sys.argv[1], "rb")
fcntl.lockf(image, fcntl.LOCK_SH, 1, 201)
open(sys.argv[2], "w")
time.sleep(1000)
EOF
other=$!
until_true "the lock" test -e "$dir/locked"
start
waited() { [ "$(grep -c 'export "raw": its device waits' "$dir/log")" -ge "$1" ]; } # times
until_true "the first try" waited 1
reload
until_true "further tries" waited 3
equal "the reloaded daemon's device" "$(readlink -f "$names/raw")" "$raw"
before=$(times_again "$raw")
kill "$other"
until_true "the device of raw" is_again "$raw" "$before"
equal "what it reads" "$(dd bs=4k count=1 iflag=direct status=none <&7 | wc -c)" 4096
exec 7<&-

say "a device all of whose requests are under way when the daemon is killed"
truncate -s 16M "$dir/slow.raw"
export_file slow "$dir/slow.raw" "ublk = true\nublkqueues = 1\nublkdepth = 1\niopslimit = 2"
reload
appears slow
slow=$device
dd if="$slow" of=/dev/null bs=4k count=12 iflag=direct status=none & reading=$!
sleep 2
die
start
appears slow
equal "the device" "$device" "$slow"
wait "$reading" || fail "reads of a device that has been gone on with"
rm "$dir/conf.d/slow.conf"
reload
until_true "the end of the slow device" test ! -e "$slow"
if can_hold_still; then
    say "another program that holds a device still while a request is under way"
    export_file slow "$dir/slow.raw" "ublk = true\nublkqueues = 1\nublkdepth = 8\niopslimit = 2"
    reload
    appears slow
    dd if="$device" of=/dev/null bs=4k count=12 iflag=direct status=none 2>/dev/null & reading=$!
    sleep 2
    python3 "$(dirname "$0")/hold_still.py" "${device#/dev/ublkb}"
    wait "$reading" && fail "reads of a device that was stopped"
    said "another program has stopped $device" || fail "nothing is said of it"
    rm "$dir/conf.d/slow.conf"
    reload
fi

say "two devices that wait for one export"
for name in used idle; do
    truncate -s 16M "$dir/$name.raw"
    export_file "$name" "$dir/$name.raw" "ublk = true"
done
reload
appears idle
idle=$device
appears used
used=$device
exec 7<"$used"
die
cp "$left/${idle#/dev/ublkb}.json" "$left/${used#/dev/ublkb}.json"
rm "$dir/conf.d/used.conf"
start
until_true "the device that is used" said "is again $used"
[ -e "$idle" ] && fail "both are there"
equal "what it reads" "$(dd bs=4k count=1 iflag=direct status=none <&7 | wc -c)" 4096
exec 7<&-
rm "$dir/conf.d/idle.conf"
reload
until_true "the end of the device" test ! -e "$used"

say "devices that wait while nobody serves them"
die
"$cowgate" ublk list | grep -q "$bare .*waits" || fail "it is not said to wait: $("$cowgate" ublk list)"
"$cowgate" ublk delete --all --force >/dev/null
equal "what is left of devices" "$("$cowgate" ublk list | grep -c /dev/ublk)" 0
start
for name in bare files raw narrow reader twin; do appears "$name"; done

# one that goes while the driver takes its commands back is in the driver's way: a kernel may complain
say "queues that run at once when the driver takes back their first command"
tracing=/sys/kernel/tracing
mount -t tracefs none $tracing 2>/dev/null || [ -e $tracing/kprobe_events ]
echo 'p:rings_that_go ublk_ch_uring_cmd flags=%si:x32' >$tracing/kprobe_events
echo 'flags & 0x800' >$tracing/events/kprobes/rings_that_go/filter # IO_URING_F_CANCEL
echo 1 >$tracing/events/kprobes/rings_that_go/enable
run_at_once() {
    local thread
    for thread in "/proc/$pid/task"/*; do
        grep -q cowgate-q "$thread/comm" || continue
        chrt -f -p 1 "${thread##*/}"
    done
    taskset -a -c -p 0 "$pid" >/dev/null
}
taken_from_rings() { grep -c rings_that_go: $tracing/trace || true; }
if can_hold_still; then
    run_at_once
    hands_over
    equal "commands of rings that went, after a hand-over" "$(taken_from_rings)" 0
    start
    for name in bare files raw narrow reader twin; do appears "$name"; done
fi
run_at_once
stop
equal "commands of rings that went, after the end" "$(taken_from_rings)" 0
echo 0 >$tracing/events/kprobes/rings_that_go/enable

say "a daemon that may not look into other programs"
start setpriv --bounding-set=-sys_ptrace
said 'without CAP_SYS_PTRACE it cannot be seen' || fail "it does not say so"
appears files
mount "$device" /mnt
rm "$dir/conf.d/files.conf"
reload
sleep 1
[ -b "$device" ] || fail "the device went while it was mounted"
cp "$dir/config" /mnt
umount /mnt
until_true "the device to go" test ! -e "$device"
stop
for name in bare files foreign base; do image_is_good "$dir/$name.qcow2"; done
equal "what is left behind" "$(find "$left" -type f | wc -l)" 0
grep -E 'panicked' "$dir/log" && fail "the daemon panicked"
dmesg | grep -E 'BUG:|WARNING:|blocked for more' && fail "the kernel complains"
say "done"
echo "all is well"
