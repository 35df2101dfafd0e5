# Zeroes and trims huge ranges of the export that `h` is connected to, and looks at what is in them and just outside.
# `fast`: whether fast zeroing is to succeed (None: it may do either); `provision`: ranges with NO_HOLE; `written`: how
# many bytes the daemon may write. `model` is a sparse file that takes every change too.
import ctypes

M, G = 1 << 20, 1 << 30
LONGEST = (4 << 30) - 512  # what 32 bits hold
size = h.get_size()
pid = int(open(pid_file).read())
edge = 192 * 1024
out = open(model, 'r+b')


def note(data, at):
    out.seek(at)
    out.write(data)


def note_zeroes(count, at):
    out.flush()
    # punch a hole, keep the size
    done = ctypes.CDLL(None, use_errno=True).fallocate64(
        out.fileno(), 3, ctypes.c_int64(at), ctypes.c_int64(count))
    assert done == 0, os.strerror(ctypes.get_errno())


def put(at, count, byte):
    data = bytes([byte]) * count
    h.pwrite(data, at)
    note(data, at)


def peek(at, count):
    out.flush()
    return os.pread(out.fileno(), count, at)


def places(start, count):
    # around both ends, and in the middle
    for at in (start, start + count, start + count // 2):
        yield max(at - edge, 0), min(at + edge, size)


def look(start, count, what):
    for a, b in places(start, count):
        got, want = h.pread(b - a, a), peek(a, b - a)
        if got != want:
            at = next(i for i in range(b - a) if got[i] != want[i])
            raise AssertionError(f'{what} of {count} at {start}: byte {a + at} is {got[at]}, not {want[at]}')


def written():
    fields = dict(line.split(': ') for line in open(f'/proc/{pid}/io').read().splitlines())
    return max(int(fields['wchar']), int(fields['write_bytes']))


def fill(start, count, byte):
    for a, b in places(start, count):
        put(a, b - a, byte)


def zero(start, count, flags, what):
    before = written()
    h.zero(count, start, flags)
    took = written() - before
    note_zeroes(count, start)
    look(start, count, what)
    assert took <= limit, f'{what} of {count} at {start} wrote {took} bytes'


h.set_strict_mode(0)
odd = 12345
lengths = [64 * M + 1, LONGEST]
for count in lengths:
    fill(odd + 70 * M, count, 17)
    zero(odd + 70 * M, count, 0, 'zeroing')
for count in provision:
    fill(odd + 70 * M, count, 18)
    zero(odd + 70 * M, count, nbd.CMD_FLAG_NO_HOLE, 'zeroing without holes')
    zero(odd + 70 * M, count, 0, 'zeroing once more')
# to the last byte
fill(size - 64 * M - 1, 64 * M + 1, 19)
zero(size - 64 * M - 1, 64 * M + 1, 0, 'zeroing up to the end')

# fast, or nothing
fill(odd, 64 * M + 1, 20)
try:
    h.zero(64 * M + 1, odd, nbd.CMD_FLAG_FAST_ZERO)
    assert fast, 'fast zeroing succeeded'
    note_zeroes(64 * M + 1, odd)
except nbd.Error as e:
    assert not fast and e.errno == 'ENOTSUP', e
look(odd, 64 * M + 1, 'fast zeroing')

# a trim leaves what it leaves, and nothing outside changes
for count in lengths:
    fill(odd + 80 * M, count, 21)
    before = written()
    h.trim(count, odd + 80 * M)
    took = written() - before
    assert took <= limit, f'a trim of {count} wrote {took} bytes'
    start, end = odd + 80 * M, odd + 80 * M + count
    for a, b in places(start, count):
        got, want = h.pread(b - a, a), peek(a, b - a)
        for i in range(b - a) if got != want else ():
            kept = got[i] == want[i]
            assert kept or start <= a + i < end and got[i] == 0, f'a trim of {count}: byte {a + i} is {got[i]}'
        note(got, a)
    zero(start, count, 0, 'zeroing what was trimmed')
h.flush()
out.close()
