"""A web server on this machine whose manners each test sets, and archives for it to serve."""

import io
import re
import socket
import struct
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NAME = "cifar_teachers.tar"
FILES = {f"cifar_teachers/{m}_vanilla/ckpt_epoch_240.pth": m.encode() * 20_000 for m in ("resnet56", "vgg13")}


def tar(members, mode="w"):
    """An archive of (name, data) pairs, or of (name, data, {field of TarInfo: value})."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, data, *fields in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in dict(*fields).items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


TEACHERS = tar(FILES.items())


class Server(ThreadingHTTPServer):
    """Serves `body` under any name; `plan` holds one keyword set per request to come, `log` the requests' headers."""

    daemon_threads = True

    def __init__(self, body=TEACHERS):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.etag, self.plan, self.log, self.sent = body, '"one"', [], [], []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, request, address):
        pass  # clients that go away are part of the tests


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *words):
        pass

    def do_GET(self):
        server = self.server
        server.log.append({"path": self.path} | dict(self.headers))
        how = server.plan.pop(0) if server.plan else {}
        status, body, headers = how.get("status", 200), server.body, {"ETag": server.etag}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if status == 200 and asked and self.headers["If-Range"] == server.etag and not how.get("ignore_range"):
            first = int(asked[1])
            status = 206 if first < len(body) else 416
            span = f"{first}-{len(body) - 1}" if status == 206 else "*"
            headers["Content-Range"] = f"bytes {span}/{len(server.body)}"
            body = body[first:]
        headers["Content-Length"] = str(len(body))
        self.send_response(status)
        for key, value in (headers | how.get("headers", {})).items():
            self.send_header(key, value)
        self.end_headers()
        if "gate" in how:
            how["gate"].wait(60)
        body = body[: how.get("cut")]
        server.sent.append(len(body))
        pace = how.get("pace", len(body) or 1)
        for at in range(0, len(body), pace):
            self.wfile.write(body[at : at + pace])
            time.sleep(0.05 if "pace" in how else 0)
        if how.get("stall"):
            time.sleep(1)
        if how.get("reset"):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
