"""Asks a control socket: control.py SOCKET, then one JSON request per line on standard input:
{"method": .., "path": .., "body": ..}. Prints [status, headers, answer] per line."""
import http.client, json, socket, sys


class Unix(http.client.HTTPConnection):
    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(sys.argv[1])


for line in sys.stdin:
    request = json.loads(line)
    connection = Unix("localhost")
    body = request.get("body")
    if body is not None and not isinstance(body, str):
        body = json.dumps(body)
    connection.request(request["method"], request["path"], body)
    answer = connection.getresponse()
    text = answer.read().decode()
    try:
        text = json.loads(text)
    except ValueError:
        pass
    print(json.dumps([answer.status, answer.getheader("content-type"), text]), flush=True)
    connection.close()
