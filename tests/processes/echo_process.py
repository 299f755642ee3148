"""An echo server as a process, with TLS: a replica of another machine.

python -m tests.processes.echo_process ADDRESS PORT TLS_FOLDER
"""

from __future__ import annotations

import ssl
import sys

from tests.servers.edge import Echo, Mirror


def main() -> None:
    """Serve until this process is killed."""
    address, port, folder = sys.argv[1:]
    server = Mirror(Echo, host=address, port=int(port))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{folder}/node.pem", f"{folder}/node.key")
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.serve_forever()


if __name__ == "__main__":
    main()
