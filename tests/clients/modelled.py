# Writes to the export `h` is connected to and keeps a model of it. Put in front of a test's program, behind lines that
# set `image` (the image file) and `raw` (where to store the model).
import errno
import random
import subprocess

size = h.get_size()
model = bytearray(size)
PIECE = 300000            # ends between sectors
STEP = 384 << 10          # leaves holes between the pieces


def block(at):
    """No zeroes, and a sixth of it compresses."""
    data = bytearray(random.Random(at).randbytes(PIECE).replace(b"\0", b"\1"))
    for start in range(0, PIECE, 6000):
        data[start:start + 1000] = b"\1" * 1000
    return bytes(data)


def attempt(request, new, at):
    """Whether the request succeeded; the model follows it. ENOSPC leaves each byte as it was or as it should be."""
    try:
        request()
    except nbd.Error as e:
        assert e.errno == "ENOSPC", e
        found, old = h.pread(len(new), at), model[at:at + len(new)]
        if found != old:
            assert all(f in (o, n) for f, o, n in zip(found, old, new)), "bytes nobody wrote at %d" % at
        model[at:at + len(new)] = found
        return False
    model[at:at + len(new)] = new
    return True


def put(data, at):
    return attempt(lambda: h.pwrite(data, at), data, at)


def zero(length, at, flags=0):
    return attempt(lambda: h.zero(length, at, flags), bytes(length), at)


def fill(at):
    """Writes on from `at` until there is no space; returns where that was."""
    while at + PIECE < size - (32 << 20):
        if not put(block(at), at):
            return at
        at += STEP
    raise SystemExit("there was space for everything")


def try_flush():
    """Whether a flush succeeded; only ENOSPC may keep it from that."""
    try:
        h.flush()
    except nbd.Error as e:
        assert e.errno == "ENOSPC", e
        return False
    return True


def check(leaks=True):
    """QEMU finds no errors in the image as it is in the file, and no leaks unless they are allowed."""
    done = subprocess.run(["qemu-img", "check", "-U", "-f", "qcow2", image], capture_output=True, text=True)
    assert done.returncode in ((0, 3) if leaks else (0,)), done.stdout + done.stderr


def same():
    for at in range(0, size, 16 << 20):
        length = min(16 << 20, size - at)
        assert h.pread(length, at) == model[at:at + length], "differs within %d bytes from %d" % (length, at)


def adopt():
    """Takes what the export holds as the model."""
    for at in range(0, size, 16 << 20):
        length = min(16 << 20, size - at)
        model[at:at + length] = h.pread(length, at)


def save(content=None):
    with open(raw, "wb") as f:
        f.write(content or model)


def extents(offset=0, length=None):
    """Runs of the export as (length, is hole, is zero), neighbours of one kind joined."""
    runs, at = [], offset
    end = size if length is None else offset + length
    while at < end:
        found = []
        h.block_status(end - at, at, lambda context, where, entries, error: found.extend(entries) and 0)
        assert found
        for run, flags in zip(found[::2], found[1::2]):
            run = min(run, end - at)
            kind = (bool(flags & nbd.STATE_HOLE), bool(flags & nbd.STATE_ZERO))
            if runs and runs[-1][1:] == kind:
                runs[-1] = (runs[-1][0] + run, *kind)
            else:
                runs.append((run, *kind))
            at += run
    return runs


def torture(count):
    """Random requests of every kind at any byte; each read must see the model."""
    seed = int(os.environ.get("COWGATE_SEED") or random.randrange(1 << 40))
    print("seed", seed, file=sys.stderr)
    dice = random.Random(seed)
    for _ in range(count):
        at = dice.randrange(size)
        length = dice.randrange(1, min(size - at, dice.choice((600, 9000, 300000))) + 1)
        fua = dice.choice((0, 0, nbd.CMD_FLAG_FUA))
        kind = dice.randrange(10)
        if kind < 4:
            data = dice.randbytes(length)
            h.pwrite(data, at, fua)
            model[at:at + length] = data
        elif kind < 6:
            h.zero(length, at, fua | dice.choice((0, nbd.CMD_FLAG_NO_HOLE)))
            model[at:at + length] = bytes(length)
        elif kind < 7:
            h.trim(length, at, fua)
            found, old = h.pread(length, at), model[at:at + length]
            assert found == old or all(f in (o, 0) for f, o in zip(found, old)), "bytes nobody wrote at %d" % at
            model[at:at + length] = found
        elif kind < 9:
            assert h.pread(length, at) == model[at:at + length], (at, length)
        else:
            h.flush()
    same()
