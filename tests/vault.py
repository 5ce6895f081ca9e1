# SPDX-License-Identifier: LGPL-2.1-or-later
"""A small server that answers as OpenBao and Vault do: there is no package of either in Debian.

After the API of OpenBao 2 and Vault 1 (api-docs: secret/kv/kv-v2, system/health, auth/token): 403 for a token that is
wrong or may not, 404 for what is not there, 503 for everything while the server is sealed. Run as a program it serves
the socket that systemd hands it (sd_listen_fds(3)).
"""

import json
import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "s.canary-token-5Tq8"
KEY = "canary-vault-Rm2x"


class Server(ThreadingHTTPServer):
    sealed = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        is_known = self.headers["X-Vault-Token"] == TOKEN
        if self.server.sealed:
            self._answer(503, {"errors": ["Vault is sealed"]})
        elif path == "/v1/sys/health":
            self._answer(200, {"sealed": False})
        elif not is_known:
            self._answer(403, {"errors": ["permission denied"]})
        elif path == "/v1/auth/token/lookup-self":
            self._answer(200, {"data": {}})
        elif path == "/v1/secret/data/vmcryptd/cr_imap":
            self._answer(200, {"data": {"data": {"key": KEY}, "metadata": {"version": 1}}})
        else:
            self._answer(404, {"errors": []})

    def _answer(self, status: int, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None: ...


if __name__ == "__main__":
    served = Server(("127.0.0.1", 0), Answers, bind_and_activate=False)
    served.socket.close()
    served.socket = socket.socket(fileno=3)
    served.serve_forever()
