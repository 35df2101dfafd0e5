# For the scripts beside this, on the host: reads their options into variables of the same names and `suite`, and leaves
# what follows them in the script's arguments. To be sourced by a script that sets `here` and `seconds` before.
set -euo pipefail
kernel=6.12 cowgate='' type=ext4 seed=1

fail_early() { printf '%s: %s\n' "$0" "$*" >&2; exit 2; }
usage() { sed -n '2,/^set/s/^# \?//p' "$0" | sed '$d' >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        --kernel) kernel=${2:-} ;;
        --cowgate) cowgate=${2:-} ;;
        --seconds) seconds=${2:-} ;;
        --type) type=${2:-} ;;
        --seed) seed=${2:-} ;;
        -*) usage ;;
        *) break ;;
    esac
    [ $# -ge 2 ] || usage
    shift 2
done
[ $# -ge 1 ] || usage
[ -x "$1/check" ] || fail_early "$1 is not a built test suite: it has no program check; see README.md"
suite=$(realpath "$1")
shift
if [ -z "$cowgate" ]; then
    (cd "$here/../.." && cargo build --quiet --bin cowgate)
    cowgate=${CARGO_TARGET_DIR:-$here/../../target}/debug/cowgate
fi
cowgate=$(realpath "$cowgate")
