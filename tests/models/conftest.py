"""A server of this machine in the place of the public addresses of weights."""

import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from detection.models import catalogue


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None: ...


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that a local server offers instead of the public addresses; weights go to another."""
    directory, weights = tmp_path / "served", tmp_path / "weights"
    directory.mkdir()
    weights.mkdir()

    def answer(*arguments: Any) -> Handler:
        return Handler(*arguments, directory=str(directory))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        for name, value in {"URL": f"http://127.0.0.1:{server.server_address[1]}", "DIGESTS": ""}.items():
            monkeypatch.setenv(f"WEIGHTS_{name}", value)
        for name in [key for key in os.environ if key.lower().endswith("_proxy")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("FETCH_TRIES", "1")
        monkeypatch.setenv("FETCH_PAUSE", "0")
        monkeypatch.setattr(catalogue, "WEIGHTS_DIRECTORY", weights)
        monkeypatch.chdir(tmp_path)
        yield directory
        server.shutdown()
        thread.join()
