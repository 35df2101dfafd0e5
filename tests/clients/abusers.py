# Clients of every bad kind, for a while. Put behind wire.py and lines that set `seconds` and `crowd` (how many of each
# kind). They leave the first half of the disk alone, and rest between their deeds: what is judged is what they make the
# server do, not how much of the processor they take themselves. Says "on" at the beginning.
import random
import threading

os.nice(15)
over = time.time() + seconds


def rest(least=0.05, most=0.3):
    time.sleep(random.uniform(least, most))


def hold(w, most=2.0):
    """Keeps a connection that gets nothing done, until the server closes it."""
    end = min(over, time.time() + most)
    w.socket.settimeout(0.2)
    while time.time() < end:
        try:
            if not w.socket.recv(1, socket.MSG_PEEK):
                return
            rest(0.2, 0.4)
        except TimeoutError:
            pass


def says_nothing(tcp):
    hold(Wire(tcp, greet=False), 30)


def half_a_handshake(tcp):
    w = Wire(tcp)
    part = random.choice((b"IHAVE", b"IHAVEOPT" + struct.pack(">II", OPT_GO, 100) + b"disk",
                          b"IHAVEOPT" + struct.pack(">II", OPT_LIST, 1 << 31) + bytes(1000)))
    for at in range(len(part)):
        w.send(part[at:at + 1])
        rest(0.0, 0.01)
    hold(w, 30)


def options_without_end(tcp):
    w = Wire(tcp)
    w.socket.settimeout(0.5)
    flood = b"".join(b"IHAVEOPT" + struct.pack(">II", option, 0) for option in (OPT_LIST, 77, OPT_STARTTLS, OPT_STRUCTURED))
    while time.time() < over:
        w.send(flood * 50)
        rest()


def garbage(tcp):
    w = Wire(tcp, greet=random.random() < 0.5)
    w.send(os.urandom(random.choice((4, 20, 1000, 50000))))
    hold(w, 1)


def reads_and_takes_nothing(tcp):
    w = Wire(tcp).go(structured=random.random() < 0.5)
    length = random.choice((4096, 64 << 10, 1 << 20, 16 << 20))
    for n in range(200):
        w.socket.settimeout(0.5)
        w.request(READ, MINE, length)
    hold(w, 30)


def trickles(tcp):
    w = Wire(tcp).go()
    length = random.choice((4096, 1 << 20, 32 << 20))
    w.send(struct.pack(">IHHQQI", MAGIC, random.choice((0, 1)), WRITE, 1, MINE, length))
    for _ in range(100):
        if time.time() > over:
            break
        w.send(bytes(100))
        rest()


def asks_for_too_much(tcp):
    w = Wire(tcp).go(structured=True)
    w.socket.settimeout(0.5)
    for length in (64 << 20, (64 << 20) + 1, 0xffffffff):
        w.request(READ, 0, length)
        w.request(CACHE, MINE, min(length, 32 << 20))
        w.request(ZEROES, MINE, min(length, 32 << 20), random.choice((0, 2)))
        w.request(STATUS, 0, length)
        rest()
    w.request(WRITE, MINE, 0xffffffff)
    hold(w, 1)


def comes_and_goes(tcp):
    for _ in range(5):
        w = Wire(tcp, greet=False)
        random.choice((w.vanish, w.socket.close))()
    rest()


def asks_for_contexts(tcp):
    w = Wire(tcp)
    w.answer(OPT_STRUCTURED)
    many = meta("disk", *("qemu:dirty-bitmap:%d" % n for n in range(500)))
    while time.time() < over:
        for data in (many, meta("disk", *[""] * 1000), meta("disk", "base:", "qemu:"), meta("disk", "x" * 4000)):
            w.answer(random.choice((OPT_SET_META, OPT_LIST_META)), data)
            rest()


def asks_for_nonsense(tcp):
    w = Wire(tcp)
    while time.time() < over:
        w.answer(OPT_GO, info("no such export %d" % random.randrange(1 << 40)))


def abuse(deed, tcp):
    while time.time() < over:
        try:
            deed(tcp)
        except (OSError, EOFError, AssertionError, struct.error):
            pass  # thrown out, as is to be expected
        rest()


kinds = (says_nothing, half_a_handshake, options_without_end, garbage, reads_and_takes_nothing, trickles,
         asks_for_too_much, comes_and_goes, asks_for_contexts, asks_for_nonsense)
threads = [threading.Thread(target=abuse, args=(kind, n % 2 == 0), daemon=True) for n in range(crowd) for kind in kinds]
for t in threads:
    t.start()
print("on", flush=True)
for t in threads:
    t.join(max(0, over + 20 - time.time()))
os._exit(0)
