"""detect.py on addresses: pictures, videos and streams of a server in this process, which break off or fall silent."""

import base64
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

from detection.errors import DataError
from detection.inference import web
from detection.inference.sources import find_sources
from tests.support.block_network import GREEN, RED, block_image, cell_box
from tests.support.detect_runs import Run, boxes_of, rows_of, save, save_video, walk

Answer = Callable[[BaseHTTPRequestHandler], None]


class QuietServer(ThreadingHTTPServer):
    """Ends with its threads, and prints nothing when a client hangs up: a later test would read it on stderr."""

    daemon_threads = False

    def handle_error(self, *_: object) -> None:
        pass


class Server:
    """A server on this machine: `server.answers["/path"] = function of the request handler`."""

    def __init__(self) -> None:
        answers: dict[str, Answer] = {}
        stop = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer = answers.get(self.path.partition("?")[0])
                if answer is None:
                    self.send_error(404)
                else:
                    answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.answers, self.stop = answers, stop
        self.http = QuietServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def content(self, kind: str, content: bytes, stated: int | None = None, silence: float = 0) -> Answer:
        """Answer with bytes; `stated`: the length that the header promises; `silence`: seconds before the end."""

        def answer(request: BaseHTTPRequestHandler) -> None:
            request.send_response(200)
            request.send_header("Content-Type", kind)
            if stated is not None:
                request.send_header("Content-Length", str(stated))
            request.end_headers()
            request.wfile.write(content)
            request.wfile.flush()
            self.stop.wait(silence)

        return answer

    def ranges(self, content: bytes) -> Answer:
        """Answer with the bytes from the asked one on."""

        def answer(request: BaseHTTPRequestHandler) -> None:
            first = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            request.send_response(206)
            request.send_header("Content-Type", "video/mp4")
            request.send_header("Accept-Ranges", "bytes")
            request.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            request.send_header("Content-Length", str(len(content) - first))
            request.end_headers()
            request.wfile.write(content[first:])

        return answer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(web, "TIMEOUT", 0.5)
    running = Server()
    yield running
    running.stop.set()
    running.http.shutdown()
    running.http.server_close()


def png(image: np.ndarray) -> bytes:
    return bytes(cv2.imencode(".png", image[..., ::-1].copy())[1].tobytes())


def motion_jpeg(images: list[np.ndarray]) -> bytes:
    """The parts of a multipart/x-mixed-replace answer, as network cameras send them."""
    parts = []
    for image in images:
        content = cv2.imencode(".jpg", image[..., ::-1].copy(), [cv2.IMWRITE_JPEG_QUALITY, 100])[1].tobytes()
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(content)}\r\n\r\n"
        parts.append(head.encode() + content + b"\r\n")
    return b"".join(parts)


def test_pictures_beside_files_and_broken_addresses(server: Server, run_detect: Run, tmp_path: Path) -> None:
    """A suffix or the server's word says what a picture is; each failure is one line, the others stay."""
    picture = png(block_image((1, 2, RED), side=128))
    server.answers["/a/photo.png"] = server.content("text/plain", picture)
    server.answers["/snapshot"] = server.content("image/png", picture)
    server.answers["/silent.png"] = server.content("image/png", picture[:20], len(picture), silence=30)
    server.answers["/short.png"] = server.content("image/png", picture[:-30], len(picture))
    server.answers["/page.png"] = server.content("text/html", b"<html>")
    save(tmp_path / "own.png", block_image((0, 0, GREEN)))
    base = f"http://{server.address}"
    (tmp_path / "list.txt").write_text(f"{base}/a/photo.png?size=large\nown.png\n")
    started = time.monotonic()
    result = run_detect(
        "own.png", *(f"{base}/{name}" for name in ("a/photo.png", "silent.png", "snapshot", "gone.jpg", "short.png")),
        f"{base}/page.png", "http://127.0.0.1:9/closed.png", "list.txt",
    )  # fmt: skip
    assert result.returncode == 0 and time.monotonic() - started < 10, result.stderr
    rows = rows_of(tmp_path / "out")
    files = ["own.png", f"{base}/a/photo.png", f"{base}/snapshot", f"{base}/a/photo.png?size=large", "own.png"]
    assert [row["file"] for row in rows] == files
    assert [row["picture"] for row in rows] == ["own.jpg", "photo.jpg", "snapshot.jpg", "photo_2.jpg", "own_2.jpg"]
    ((name, box),) = boxes_of(rows[1])
    assert name == "red" and box == pytest.approx(cell_box(1, 2, 128), abs=0.01)
    lines = result.stderr.splitlines()
    assert len(lines) == 5 and "5 left out" in result.stdout
    expected = {"silent.png": "timed out", "gone.jpg": "404", "short.png": "", "page.png": "", "closed.png": "refused"}
    for line, (name, reason) in zip(lines, expected.items(), strict=True):
        assert line.startswith("left out: ") and f"/{name}" in line and reason in line and "http://" in line, line


def test_passwords_are_used_but_not_shown(server: Server, run_detect: Run, tmp_path: Path) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        pair = base64.b64encode(b"me:s3cret@x").decode()
        good = request.headers.get("Authorization") == f"Basic {pair}"
        (server.content("image/png", png(block_image())) if good else lambda handler: handler.send_error(401))(request)

    server.answers["/photo.png"] = answer
    address = f"http://me:s3cret%40x@{server.address}"
    result = run_detect(f"{address}/photo.png", f"{address}/gone.png")
    assert result.returncode == 0 and "1 images, 1 left out" in result.stdout, result.stderr
    assert rows_of(tmp_path / "out")[0]["file"] == f"http://{server.address}/photo.png"
    assert "s3cret" not in result.stdout + result.stderr + (tmp_path / "out" / "detections.json").read_text()


def test_a_camera_that_breaks_off_is_one_line(server: Server, run_detect: Run, tmp_path: Path) -> None:
    """Motion JPEG of 6 frames and a seventh that ends early, then a stream that falls silent, then a file."""
    frames = motion_jpeg(walk(frames=7))
    kind = "multipart/x-mixed-replace; boundary=frame"
    server.answers["/live"] = server.content(kind, frames[:-200])
    server.answers["/silent"] = server.content(kind, motion_jpeg(walk(frames=4)), silence=30)
    save(tmp_path / "own.png", block_image((0, 0, GREEN)))
    base, started = f"http://{server.address}", time.monotonic()
    result = run_detect(f"{base}/live", f"{base}/silent", f"{base}/gone", "own.png")
    assert result.returncode == 0 and time.monotonic() - started < 20, result.stderr
    rows = rows_of(tmp_path / "out")
    numbers = {name: [row["frame"] for row in rows if row["file"].endswith(name)] for name in ("live", "silent")}
    assert len(numbers["live"]) in (6, 7) and len(numbers["silent"]) in (3, 4)  # FFmpeg may hold the last one back
    for row in rows[:6]:
        ((name, box),) = boxes_of(row)
        assert name == ("red" if row["frame"] % 2 else "green")
        assert box == pytest.approx(cell_box(row["frame"] % 4, row["frame"] // 4), abs=0.05)
    assert rows[-1]["file"] == "own.png"
    text = result.stderr
    for name, found in numbers.items():
        assert text.count(f"{base}/{name}: the stream ended after {len(found)} frames") == 1
    assert text.count(f"left out: {base}/gone: cannot be opened as a picture, video or stream") == 1
    assert (tmp_path / "out" / "live.mp4").stat().st_size > 0


def test_a_video_file_from_a_server(server: Server, run_detect: Run, tmp_path: Path) -> None:
    content = save_video(tmp_path / "clip.avi", walk(), "MJPG").read_bytes()
    server.answers["/clip.avi"] = server.content("video/x-msvideo", content, len(content))
    result = run_detect(f"http://{server.address}/clip.avi")
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path / "out")
    assert [row["frame"] for row in rows] == list(range(8)) and "promises" not in result.stderr


def test_a_server_without_ranges_is_named_where_it_matters(server: Server, run_detect: Run, tmp_path: Path) -> None:
    """The index of this .mp4 is behind its pictures, and a filler keeps them out of one buffer of FFmpeg."""
    content = save_video(tmp_path / "clip.mp4", walk(), "mp4v").read_bytes()
    index = content.index(b"moov") - 4
    assert index > content.index(b"mdat")
    content = content[:index] + struct.pack(">I4s", 2**22, b"free") + bytes(2**22 - 8) + content[index:]
    for name in ("/clip.mp4", "/clip"):
        server.answers[name] = server.content("video/mp4", content, len(content))
    server.answers["/page"] = server.content("text/html", b"<html>", 6)
    server.answers["/ranges.mp4"] = server.ranges(content)
    base = f"http://{server.address}"
    result = run_detect(*(f"{base}/{name}" for name in ("clip.mp4", "clip", "page", "ranges.mp4", "gone.mp4")))
    assert result.returncode == 0, result.stderr
    lines = {line.split(": ")[1]: line for line in result.stderr.splitlines() if line.startswith("left out: ")}
    assert lines.keys() == {f"{base}/{name}" for name in ("clip.mp4", "clip", "page", "gone.mp4")}
    named = [name for name, line in lines.items() if "the server sends the file as a whole only (no range" in line]
    assert named == [f"{base}/clip.mp4", f"{base}/clip"] and "404" in lines[f"{base}/gone.mp4"]
    assert [row["frame"] for row in rows_of(tmp_path / "out")] == list(range(8))


@pytest.mark.parametrize(
    ("word", "kind", "name"),
    [
        ("rtsp://user:pw@camera.local:554/stream1?x=1", "video", "stream1"),
        ("rtsp://camera.local", "video", "camera.local"),
        ("HTTP://host/a/My%20Photo%2F1.JPG?size=2", "image", "1"),
        ("https://host/clip.mp4", "video", "clip"),
    ],
)
def test_what_an_address_is(word: str, kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_open", lambda url: (_ for _ in ()).throw(OSError("no server is asked")))
    (source,) = find_sources([word])
    assert (source.kind, source.file, source.name) == (kind, word, name) and "pw" not in source.label


@pytest.mark.parametrize("word", ["ftp://host/photo.png", "file:///etc/passwd", "http://[/photo.png"])
def test_other_addresses_are_refused(word: str) -> None:
    with pytest.raises(DataError):
        find_sources([word])
