#!/usr/bin/python3
"""Mixed load on several exports at once, with a record of what must have survived when the server is killed.

usage: recorder.py SOCKET SEED [lie] NAME ...
Takes commands, one a line, and answers each with one line:
  load                connects, verifies that each export holds what it should, says "on"; then works until the server
                      dies and says "dead" and how many requests and flushes were acknowledged
  verify NAME FILE    compares a raw copy of an export with the record: what was acknowledged before an acknowledged flush
                      is there, anything later may be old or new; the copy is the truth from then on
  check NAME FILE     the same without taking the copy as the truth
  fresh NAME FILE     forgets what is known about an export: it is a new one with this content
With `lie` flushes are not sent, only believed: what is verified then must be found wrong.
"""
import errno
import random
import select
import sys

import nbd

SECTOR = 512
CONNECTIONS = 2      # for each export
FLIGHT = 3           # requests in flight on each connection
GONE = {"ENOTCONN", "ESHUTDOWN", "ECONNRESET", "EPIPE", "EINVAL", "ECONNREFUSED"}

socket, seed, names = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
lie = "lie" in names[:1]
names = names[1:] if lie else names
dice = random.Random(seed)


class Wrong(Exception):
    pass


class Export:
    """What an export must hold and may hold."""

    def __init__(self, name):
        self.name = name
        self.base = bytearray()   # what is certainly there, where nothing is said in `later`
        self.later = {}           # sector -> [content, when it was acknowledged or None], in order
        self.busy = []            # ranges of requests in flight
        self.clock = 0            # acknowledgements so far
        self.acknowledged = self.flushes = 0

    def latest(self, sector):
        entries = self.later.get(sector)
        return entries[-1][0] if entries else self.base[sector * SECTOR:(sector + 1) * SECTOR]

    def expected(self, start, end):
        first, last = start // SECTOR, (end - 1) // SECTOR
        whole = b"".join(bytes(self.latest(s)) for s in range(first, last + 1))
        return whole[start - first * SECTOR:end - first * SECTOR]

    def begin(self, start, data):
        """These bytes may be there from now on. Returns what `acknowledge` needs."""
        entries, at, end = [], start, start + len(data)
        while at < end:
            sector = at // SECTOR
            stop = min((sector + 1) * SECTOR, end)
            new = bytearray(self.latest(sector))
            new[at - sector * SECTOR:stop - sector * SECTOR] = data[at - start:stop - start]
            entry = [bytes(new), None]
            self.later.setdefault(sector, []).append(entry)
            entries.append((sector, entry, stop - at == SECTOR))
            at = stop
        return entries

    def acknowledge(self, entries, durable=False):
        self.clock += 1
        for sector, entry, whole in entries:
            entry[1] = self.clock
            if durable and whole:
                self.settle(sector, entry)

    def settle(self, sector, entry):
        entries = self.later[sector]
        self.base[sector * SECTOR:(sector + 1) * SECTOR] = entry[0]
        del entries[:next(i for i, e in enumerate(entries) if e is entry) + 1]
        if not entries:
            del self.later[sector]

    def flushed(self, mark):
        for sector in list(self.later):
            done = [e for e in self.later[sector] if e[1] is not None and e[1] <= mark]
            if done:
                self.settle(sector, done[-1])
        self.flushes += 1

    def verify(self, found):
        if len(found) != len(self.base):
            raise Wrong("%s: %d bytes instead of %d" % (self.name, len(found), len(self.base)))
        for at in range(0, len(found), 1 << 16):
            if found[at:at + (1 << 16)] == self.base[at:at + (1 << 16)]:
                continue
            for sector in range(at // SECTOR, min(at + (1 << 16), len(found)) // SECTOR):
                place = slice(sector * SECTOR, (sector + 1) * SECTOR)
                now, must = found[place], self.base[place]
                others = [e[0] for e in self.later.get(sector, [])]
                if now == must or now in others:
                    continue
                bad = [i for i in range(SECTOR) if now[i] != must[i] and not any(o[i] == now[i] for o in others)]
                if bad:
                    raise Wrong("%s: byte %d is %#04x, flushed was %#04x (%d bytes of the sector; %d later writes)" % (
                        self.name, sector * SECTOR + bad[0], now[bad[0]], must[bad[0]], len(bad), len(others)))

    def forget(self, found):
        self.base, self.later, self.busy = bytearray(found), {}, []


exports = {name: Export(name) for name in names}


def place(export):
    size = len(export.base)
    for _ in range(20):
        length = dice.choice((dice.randrange(1, 2000), 512, 4096, 20000, 65536, 131072))
        at = dice.randrange(size)
        if dice.random() < 0.6:
            at -= at % dice.choice((512, 4096, 65536))
        if at % 512 == 0 and dice.random() < 0.7:
            length = max(length - length % 512, 512)
        end = min(at + length, size)
        first, last = at // SECTOR * SECTOR, -(-end // SECTOR) * SECTOR
        if not any(first < e and s < last for s, e in export.busy):
            export.busy.append((first, last))
            return at, end, (first, last)
    return None


class Client:
    """One connection."""

    def __init__(self, export):
        self.export, self.flight = export, 0
        self.h = nbd.NBD()
        self.h.connect_uri("nbd+unix:///%s?socket=%s" % (export.name, socket))

    def issue(self):
        """Begins one request."""
        export, h = self.export, self.h
        kind = dice.randrange(100)
        fua = nbd.CMD_FLAG_FUA if dice.random() < 0.05 else 0
        if kind < 8:
            mark = export.clock
            if lie:
                export.flushed(mark)
                return
            h.aio_flush(completion=self.ended(lambda: export.flushed(mark)))
        else:
            found = place(export)
            if found is None:
                return
            at, end, range_ = found
            free = lambda: export.busy.remove(range_)
            if kind < 20:
                buf = nbd.Buffer(end - at)

                def compare():
                    if buf.to_bytearray() != export.expected(at, end):
                        raise Wrong("%s: %d bytes read at %d are not what was written" % (export.name, end - at, at))
                    free()
                h.aio_pread(buf, at, completion=self.ended(compare))
            elif kind < 70:
                word = dice.randbytes(16)
                data = dice.choice((word * 33, dice.randbytes(521)))
                data = (data * ((end - at) // len(data) + 1))[:end - at]
                entries = export.begin(at, data)
                done = lambda: (export.acknowledge(entries, fua and not lie), free())
                h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), at, flags=fua, completion=self.ended(done))
            elif kind < 90:
                entries = export.begin(at, bytes(end - at))
                flags = fua | dice.choice((0, nbd.CMD_FLAG_NO_HOLE))
                done = lambda: (export.acknowledge(entries, fua and not lie), free())
                h.aio_zero(end - at, at, flags=flags, completion=self.ended(done))
            else:
                self.trim(at, end, free)
        self.flight += 1

    def trim(self, at, end, free):
        """Zeroes or what was there: read at once, to learn which."""
        export = self.export
        export.begin(at, bytes(end - at))
        buf = nbd.Buffer(end - at)

        def learn():
            data = bytes(buf.to_bytearray())
            export.acknowledge(export.begin(at, data))
            free()

        def trimmed():
            self.flight += 1
            later.append(lambda: self.h.aio_pread(buf, at, completion=self.ended(learn)))
        self.h.aio_trim(end - at, at, completion=self.ended(trimmed))

    def ended(self, well):
        def completion(error):
            if error.value == 0:  # libnbd hands over a box
                self.export.acknowledged += 1
                self.flight -= 1
                try:
                    well()
                except Wrong as e:
                    problems.append(str(e))
            else:
                failures.append(error.value)
            return 1
        return completion


later = []        # what completions cannot do themselves
problems = []
failures = []


def load():
    for export in exports.values():
        client = Client(export)
        found = b"".join(client.h.pread(min(8 << 20, len(export.base) - at), at)
                         for at in range(0, len(export.base), 8 << 20))
        if found != export.base:
            raise Wrong("%s: the server reads something else than QEMU" % export.name)
        client.h.shutdown()
    clients = [Client(export) for export in exports.values() for _ in range(CONNECTIONS)]
    before = sum(e.acknowledged for e in exports.values()), sum(e.flushes for e in exports.values())
    print("on", flush=True)
    try:
        while not failures:
            for client in dice.sample(clients, len(clients)):
                if client.flight < FLIGHT:
                    client.issue()
            while later:
                later.pop()()
            poll(clients)
            if problems:
                raise Wrong("; ".join(problems))
    except nbd.Error as e:
        # libnbd has no number for the end of a connection
        if e.errno not in GONE and "disconnected" not in str(e):
            raise Wrong("a request failed: %s" % e)
    strange = {errno.errorcode.get(e, e) for e in failures} - GONE
    if strange:
        raise Wrong("requests failed with %s" % strange)
    for export in exports.values():
        export.busy = []
    after = sum(e.acknowledged for e in exports.values()), sum(e.flushes for e in exports.values())
    failures.clear()
    later.clear()
    return "dead %d %d" % (after[0] - before[0], after[1] - before[1])


def poll(clients):
    poller, by_fd = select.poll(), {}
    for client in clients:
        direction = client.h.aio_get_direction()
        events = (select.POLLIN if direction & nbd.AIO_DIRECTION_READ else 0) | (
            select.POLLOUT if direction & nbd.AIO_DIRECTION_WRITE else 0)
        fd = client.h.aio_get_fd()
        by_fd[fd] = client
        poller.register(fd, events)
    for fd, events in poller.poll(200):
        h = by_fd[fd].h
        if events & select.POLLOUT and h.aio_get_direction() & nbd.AIO_DIRECTION_WRITE:
            h.aio_notify_write()
        elif h.aio_get_direction() & nbd.AIO_DIRECTION_READ:
            h.aio_notify_read()
        elif events & (select.POLLHUP | select.POLLERR):
            failures.append(107)
        if h.aio_is_dead() or h.aio_is_closed():
            failures.append(107)


def answer(command, *words):
    if command == "load":
        return load()
    export = exports[words[0]]
    with open(words[1], "rb") as f:
        found = f.read()
    if command in ("verify", "check"):
        export.verify(found)
    if command != "check":
        export.forget(found)
    return {"verify": "verified", "check": "checked", "fresh": "fresh"}[command]


for line in sys.stdin:
    try:
        print(answer(*line.split()), flush=True)
    except Wrong as e:
        print("wrong:", e, flush=True)
        break
