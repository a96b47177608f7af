"""Start the page: `python app.py`, on a laptop, in Docker or on a Space.

Host, port and proxy path come from Gradio's own variables (GRADIO_SERVER_NAME,
GRADIO_SERVER_PORT, GRADIO_ROOT_PATH). Reading the libraries takes some seconds; meanwhile the
address answers with a page that says so and then turns into the real one.
"""

import os
import signal
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Before gradio is imported: no call home, no fallback to pickled weights in the background.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

STARTING = b"""<!doctype html><html lang="en"><meta charset="utf-8"><title>mlpmoe</title>
<meta name="color-scheme" content="light dark"><meta name="viewport" content="width=device-width">
<body style="font: 1rem system-ui, sans-serif; margin: 4rem auto; max-width: 36rem">
<h1 style="font-size: 1.5rem">mlpmoe</h1><p>Starting: reading the libraries, some seconds.</p>
<script>setInterval(() => fetch("config").then((answer) => answer.ok && location.reload())
  .catch(() => {}), 300)</script></body></html>"""


class Starting(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = self.path.split("?")[0] == "/"
        self.send_response(200 if found else 503)  # 503: `config` answers once it is there
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(STARTING if found else b"starting")

    def log_message(self, *_: object) -> None: ...


def starting_page() -> ThreadingHTTPServer:
    """The page that stands in, on the port that the real one will have."""
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    chosen = os.environ.get("GRADIO_SERVER_PORT")
    for port in [int(chosen)] if chosen else range(7860, 7960):
        try:
            server = ThreadingHTTPServer((host, port), Starting)
        except OSError:
            continue
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server
    raise SystemExit(f"port {chosen or '7860 to 7959'} is in use")


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # meanwhile it ends without a traceback
    server = starting_page()

if os.environ.get("SPACES_ZERO_GPU"):
    import spaces  # noqa: F401 – a ZeroGPU Space, where it comes before torch

from mlpmoe.explorer.app import build_demo  # noqa: E402 – the slow part
from mlpmoe.explorer.launch import launch_kwargs  # noqa: E402
from mlpmoe.models.ending import end_when_asked  # noqa: E402

if __name__ == "__main__":
    end_when_asked()  # before anything is made that would be left behind
try:
    demo = build_demo()
except KeyboardInterrupt:
    raise SystemExit from None

if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        server.shutdown()
        server.server_close()
        demo.launch(server_port=server.server_port, **launch_kwargs())
