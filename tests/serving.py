"""Serves HTTP on a free local port, for tests of clients."""

import contextlib
import threading
from http.server import HTTPServer


@contextlib.contextmanager
def serving(handler, **attributes):
    """Yields a server that answers with a BaseHTTPRequestHandler, which finds it as self.server.

    Args:
      **attributes: set on the server.
    """
    server = HTTPServer(("127.0.0.1", 0), handler)
    vars(server).update(attributes)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
