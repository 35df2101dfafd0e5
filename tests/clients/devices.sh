# Words for block devices of exports, for tests that run in a guest. To be sourced after guest.sh.
# shellcheck shell=bash disable=SC2034,SC2154 # sourced: `device` is for the script, `dir` is guest.sh's
names=/dev/cowgate/by-name

# Waits for the device of an export; sets `device`.
appears() { # export
    until_true "the device of $1" test -b "$names/$1"
    device=$(readlink -f "$names/$1")
}
# Everything that every test ends with: nothing is left, nobody complains.
nothing_is_left() {
    equal "what is left of devices" "$(find /sys/class/ublk-char/ -mindepth 1 2>/dev/null | wc -l)" 0
    equal "what is left of links" "$(find "$names" -mindepth 1 2>/dev/null | wc -l)" 0
    grep -E 'panicked' "$dir/log" && fail "the daemon panicked"
    dmesg | grep -E 'BUG:|WARNING:|blocked for more|I/O error' && fail "the kernel complains"
    return 0
}
