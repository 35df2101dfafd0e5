# The NBD protocol byte by byte, for clients that do not keep to it. Put in front of a test's program, behind lines that
# set `unix` (path of the socket), `port` (on 127.0.0.1) and `pid` (the daemon's).
import os
import socket
import struct
import time

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS, OPT_INFO, OPT_GO, OPT_STRUCTURED, OPT_LIST_META, OPT_SET_META, \
    OPT_EXTENDED = 1, 2, 3, 5, 6, 7, 8, 9, 10, 11
ACK, SERVER, INFO, CONTEXT = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_UNKNOWN, ERR_SHUTDOWN, ERR_TOO_BIG, ERR_EXT_HEADER_REQD = \
    ((1 << 31) + n for n in (1, 2, 3, 6, 7, 9, 10))
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
EIO, EINVAL, ENOSPC, EOVERFLOW, ESHUTDOWN = 5, 22, 28, 75, 108
MAGIC = 0x25609513
NO_HOLE, DF, ONE, FAST, PAYLOAD = 2, 4, 8, 16, 32
NONE, DATA, HOLE, BLOCK_STATUS, BLOCK_STATUS_EXT, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 6, 0x8001, 0x8002
# far more than any answer takes
PATIENCE = 30


class Wire:
    """One connection, greeted unless `greet` is false."""

    def __init__(self, tcp=False, greet=True):
        if tcp:
            self.socket = socket.create_connection(("127.0.0.1", port))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(unix)
        self.socket.settimeout(PATIENCE)
        self.cookie = 0
        if greet:
            assert self.recv(18) == b"NBDMAGICIHAVEOPT\x00\x03"
            self.send(struct.pack(">I", 3))

    def send(self, data):
        self.socket.sendall(data)

    def recv(self, length):
        data = b""
        while len(data) < length:
            piece = self.socket.recv(length - len(data))
            if not piece:
                raise EOFError(data)
            data += piece
        return data

    def closed(self):
        """Waits for the server to close; nothing may come before that."""
        try:
            rest = self.socket.recv(1)
        except (ConnectionResetError, BrokenPipeError):
            return True
        return rest == b""

    def vanish(self):
        """Closes with a reset where there are resets (TCP)."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    # ---- handshake

    def option(self, option, data=b"", length=None):
        self.send(b"IHAVEOPT" + struct.pack(">II", option, len(data) if length is None else length) + data)

    def reply(self):
        """(option, type, data) of one option reply."""
        magic, option, kind, length = struct.unpack(">QIII", self.recv(20))
        assert magic == 0x3E889045565A9, hex(magic)
        return option, kind, self.recv(length)

    def answer(self, option, data=b""):
        """Sends an option; the type and data of its last reply."""
        self.option(option, data)
        while True:
            replied, kind, data = self.reply()
            assert replied == option
            if kind == ACK or kind >= 1 << 31:
                return kind, data

    def go(self, name="disk", structured=False):
        if structured:
            assert self.answer(OPT_STRUCTURED) == (ACK, b"")
        assert self.answer(OPT_GO, info(name)) == (ACK, b"")
        return self

    # ---- transmission

    def request(self, kind, offset=0, length=0, flags=0, payload=b"", magic=MAGIC):
        self.cookie += 1
        self.send(struct.pack(">IHHQQI", magic, flags, kind, self.cookie, offset, length) + payload)
        return self.cookie

    def simple(self):
        """(error, cookie) of a simple reply."""
        magic, error, cookie = struct.unpack(">IIQ", self.recv(16))
        assert magic == 0x67446698, hex(magic)
        return error, cookie

    def ask(self, kind, offset=0, length=0, flags=0, payload=b""):
        """The error of a request without data in its reply."""
        cookie = self.request(kind, offset, length, flags, payload)
        error, replied = self.simple()
        assert cookie == replied
        return error

    # ---- transmission with extended headers

    def extended(self, name="disk", *contexts):
        """Goes with extended headers; the ids of these contexts."""
        assert self.answer(OPT_EXTENDED) == (ACK, b"")
        ids = self.select(name, *contexts) if contexts else []
        assert self.answer(OPT_GO, info(name)) == (ACK, b"")
        return ids

    def select(self, name, *contexts):
        self.option(OPT_SET_META, meta(name, *contexts))
        ids = []
        while True:
            _, kind, data = self.reply()
            if kind != CONTEXT:
                assert kind == ACK, hex(kind)
                return ids
            ids.append(struct.unpack(">I", data[:4])[0])

    def request64(self, kind, offset=0, length=0, flags=0, payload=b""):
        self.cookie += 1
        self.offset = offset
        self.send(struct.pack(">IHHQQQ", 0x21E41C71, flags, kind, self.cookie, offset, length) + payload)

    def chunk64(self):
        """(done, type, payload) of one extended chunk of the latest request."""
        magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQQ", self.recv(32))
        assert magic == 0x6E8A278C and cookie == self.cookie and offset == self.offset, (hex(magic), cookie, offset)
        return flags & 1 == 1, kind, self.recv(length)

    def chunk(self):
        """(done, type, payload) of one structured chunk."""
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.recv(20))
        assert magic == 0x668E33EF and cookie == self.cookie, (hex(magic), cookie)
        return flags & 1 == 1, kind, self.recv(length)

    def chunks(self, chunk=None):
        """All chunks of the latest request: (type, payload)."""
        all, done = [], False
        while not done:
            done, kind, payload = (chunk or self.chunk64)()
            all.append((kind, payload))
        return all

    def ask64(self, kind, offset=0, length=0, flags=0, payload=b""):
        """The error of a request without data in its reply."""
        self.request64(kind, offset, length, flags, payload)
        (kind, payload), = self.chunks()
        assert kind in (NONE, ERROR), kind
        return struct.unpack(">I", payload[:4])[0] if kind == ERROR else 0

    def status64(self, offset, length, flags=0, payload=b""):
        """The descriptors by context id."""
        self.request64(STATUS, offset, length, flags, payload)
        answer = {}
        for kind, payload in self.chunks():
            assert kind == BLOCK_STATUS_EXT, (kind, payload)
            id, count = struct.unpack(">II", payload[:8])
            assert id not in answer and len(payload) == 8 + 16 * count > 8
            answer[id] = list(struct.iter_unpack(">QQ", payload[8:]))
        return answer

    def well(self):
        """The connection still does what it should."""
        data = os.urandom(5000)
        assert self.ask(WRITE, MINE, len(data), payload=data) == 0
        cookie = self.request(READ, MINE, len(data))
        assert self.simple() == (0, cookie)
        assert self.recv(len(data)) == data


def info(name, items=0):
    """Data of NBD_OPT_GO and NBD_OPT_INFO."""
    return struct.pack(">I", len(name)) + name.encode() + struct.pack(">H", items)


def meta(name, *queries):
    """Data of NBD_OPT_SET_META_CONTEXT and NBD_OPT_LIST_META_CONTEXT."""
    data = struct.pack(">I", len(name)) + name.encode() + struct.pack(">I", len(queries))
    return data + b"".join(struct.pack(">I", len(q)) + q.encode() for q in queries)


def content(offset, length, chunks):
    """The data of a read, put together from its chunks, every byte of which must come once."""
    data, come = bytearray(length), 0
    for kind, payload in chunks:
        if kind == NONE:
            continue
        at = struct.unpack(">Q", payload[:8])[0] - offset
        if kind == DATA:
            data[at:at + len(payload) - 8] = payload[8:]
            come += len(payload) - 8
        else:
            assert kind == HOLE and len(payload) == 12, kind
            come += struct.unpack(">I", payload[8:])[0]
    assert len(data) == length == come, (length, come)
    return bytes(data)


def resident():
    """Memory of the daemon in bytes."""
    for line in open("/proc/%d/status" % pid):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise SystemExit("no VmRSS")


# the half of the disk that well-behaved clients leave alone
MINE = 32 << 20
