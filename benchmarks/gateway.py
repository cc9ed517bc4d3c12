"""What the gateway adds to a request, and what LiteLLM's proxy adds, like for like.

    python benchmarks/gateway.py [--litellm] [--rounds 3] [--streams 50] [--cache DIR]

Runs `plait bench gateway --json`, which says what is compared. With --litellm it first installs
LiteLLM's proxy into an environment of its own (some hundred megabytes) and names it in the same
run: LiteLLM (one worker, as we are one process) stands in front of a bare server over the same
engine, in a process of its own; its figures are what it adds to that server.
"""

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

START_TIMEOUT_S = 180


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def litellm(cache: Path, upstream_port: int):
    """LiteLLM's proxy before a port; gives its base URL."""
    folder, port = cache / "litellm", free_port()
    if not (folder / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin/python"), "-m", "pip", "install", "-q", "litellm[proxy]"]
        subprocess.run(pip, check=True)
        (folder / ".ready").touch()
    parameters = {
        "model": "openai/tiny-random",
        "api_base": f"http://127.0.0.1:{upstream_port}/v1",
        "api_key": "none",
    }
    models = [{"model_name": "tiny-random", "litellm_params": parameters}]
    config = cache / "litellm.yaml"
    config.write_text(json.dumps({"model_list": models}))  # JSON is YAML
    command = [str(folder / "bin/litellm"), "--config", str(config), "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        env={
            "PATH": "/usr/bin:/bin",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # no look-up of prices on the net
            "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",  # loopback only
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health/liveliness", timeout=1)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--litellm", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=50)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/plait/conformance")
    options = parser.parse_args()
    command = [sys.executable, "-m", "plait", "bench", "gateway", "--json"]
    command += ["--rounds", str(options.rounds), "--streams", str(options.streams)]
    if not options.litellm:
        subprocess.run(command, check=True)
        return
    port = free_port()
    options.cache.mkdir(parents=True, exist_ok=True)
    with litellm(options.cache, port) as url:
        more = ["--port", str(port), "--proxy", f"litellm={url}=tiny-random"]
        subprocess.run([*command, *more], check=True)


if __name__ == "__main__":
    main()
