# Replays operations on the export `h` is connected to, and reads it back. Put in front of it: `operations`, the file
# with one operation a line (see tests/common/operations.rs); `noise`, the file that "noise" writes repeat.
READY = 6          # requests in flight


def lines():
    with open(operations) as f:
        return [line.split() for line in f]


def content(kind, length):
    if kind == "noise":
        with open(noise, "rb") as f:
            pattern = f.read()
        return (pattern * (length // len(pattern) + 1))[:length]
    return bytes([int(kind)]) * length


def replay():
    """Operations that do not touch the same bytes run at the same time."""
    flight = []

    def drain(most):
        while len(flight) > most:
            for entry in flight[:]:
                if h.aio_command_completed(entry[0]):
                    flight.remove(entry)
            if len(flight) > most:
                h.poll(-1)

    for name, at, length, how, fua in lines():
        at, length = int(at), int(length)
        if name == "flush" or any(at < end and start < at + length for _, start, end, _ in flight):
            drain(0)
        flags = nbd.CMD_FLAG_FUA if fua == "fua" else 0
        data = None
        if name == "write":
            data = nbd.Buffer.from_bytearray(bytearray(content(how, length)))
            cookie = h.aio_pwrite(data, at, flags=flags)
        elif name == "zero":
            cookie = h.aio_zero(length, at, flags=flags | (nbd.CMD_FLAG_NO_HOLE if how == "keep" else 0))
        elif name == "discard":
            cookie = h.aio_trim(length, at)
        elif name == "flush":
            cookie = h.aio_flush()
        else:
            raise SystemExit("what is " + name)
        flight.append((cookie, at, at + length, data))
        drain(READY)
    drain(0)
    h.shutdown()


def dump(path, windows):
    """Stores the windows of the disk, one behind the other; everything else must read as zeroes."""
    size, at = h.get_size(), 0
    with open(path, "wb") as f:
        for start, end in windows:
            for at in range(start, end, 8 << 20):
                f.write(h.pread(min(8 << 20, end - at), at))
    inside = iter(windows + [(size, size)])
    at = 0
    for start, end in inside:
        while at < start:
            found = []
            h.block_status(min(start - at, 1 << 31), at, lambda c, w, entries, e: found.extend(entries) and 0)
            for length, flags in zip(found[::2], found[1::2]):
                stop = min(at + length, start)
                while at < stop and not flags & nbd.STATE_ZERO:
                    some = min(stop - at, 8 << 20)
                    assert not any(h.pread(some, at)), "bytes nobody wrote near %d" % at
                    at += some
                at = stop
        at = end
    h.shutdown()
