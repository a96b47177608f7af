"""Start the page: `python app.py`, on a laptop, in Docker or on a Space.

Host, port and proxy path come from Gradio's own variables (GRADIO_SERVER_NAME,
GRADIO_SERVER_PORT, GRADIO_ROOT_PATH).
"""

import os

# Before gradio is imported: no call home, no fallback to pickled weights in the background.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
# Threads that wait for work leave the core to whoever needs it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from mlpmoe.explorer.page import build_demo, launch_kwargs

demo = build_demo()

if __name__ == "__main__":
    demo.launch(**launch_kwargs())
