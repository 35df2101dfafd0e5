# TLS for wire.py, by Python's own library. Put behind it; `trusted` is the file of the authority.
import ssl

ERR_TLS_REQD = (1 << 31) + 5


def context():
    context = ssl.create_default_context(cafile=trusted)
    # Python refuses an end without close_notify, as it should
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    return context


def hello():
    """A client's first message."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        context().wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read()


class Wire(Wire):
    def start_tls(self):
        assert self.answer(OPT_STARTTLS) == (ACK, b"")
        # another descriptor of the same socket, for what is not TLS
        self.raw = self.socket.dup()
        self.socket = context().wrap_socket(self.socket, server_hostname="localhost")
        return self

    def until_closed(self):
        """Whatever comes until the server has closed."""
        rest = b""
        try:
            while True:
                piece = self.socket.recv(65536)
                if not piece:
                    return rest
                rest += piece
        except (ConnectionResetError, BrokenPipeError, ssl.SSLError):
            return rest

    def well_small(self):
        data = os.urandom(5000)
        assert self.ask(WRITE, 0, len(data), payload=data) == 0
