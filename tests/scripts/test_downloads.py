"""The download scripts with small files on a local server that fails as real ones do."""

import hashlib
import http.server
import os
import re
import shutil
import stat
import struct
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

WEIGHTS_SCRIPT = REPOSITORY / "models/weights/download_darknet_weights.sh"
ANY_SCRIPT = REPOSITORY / "models/weights/download_weights.sh"
CATALOGUE = REPOSITORY / "models/weights/catalogue.yaml"
FORWARDER = REPOSITORY / "yolo-v3/models/weights/download_darknet_weights.sh"
COCO_SCRIPT = REPOSITORY / "data/download_coco.sh"
FETCHING = REPOSITORY / "data/fetching.sh"
NAME = "darknet53.conv.74"
HEADER = struct.pack("<3iQ", 0, 2, 0, 32013312)  # major, minor, revision, images seen
WEIGHTS = HEADER + bytes(range(256)) * 80  # 20,500 bytes
WRONG = WEIGHTS[:-1] + b"!"  # right size and header
PAGE = b"<!DOCTYPE html><html><title>Survival strategies</title></html>\n" * 20
HALF = 6000
ARCHIVES = {"annotations_trainval2017.zip": "annotations", "val2017.zip": "val2017", "train2017.zip": "train2017"}

TOOLS = [
    pytest.param(name, marks=pytest.mark.skipif(not shutil.which(name), reason=f"{name} is not installed"))
    for name in ("curl", "wget")
]
pytestmark = pytest.mark.skipif(
    not shutil.which("sh") or not (shutil.which("curl") or shutil.which("wget")), reason="needs sh and curl or wget"
)
needs_unzip = pytest.mark.skipif(not shutil.which("unzip"), reason="unzip is not installed")


class Server(http.server.ThreadingHTTPServer):
    """Answers http://.../BEHAVIOUR/any/FILE; `files` holds the right bytes, `requests` what was asked for.

    BEHAVIOUR is missing, redirect, page (of an error), other (the bytes of `others`), hang, or words joined by "+":
    good; cut (the first answer breaks off), cut_always; no_range, no_length; then_missing (404 from the second on).
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {NAME: WEIGHTS, "yolov3.weights": WEIGHTS}
        self.others: dict[str, bytes] = {NAME: WRONG}
        self.requests: list[tuple[str, str | None]] = []  # (behaviour, Range)
        self.released = threading.Event()  # ends those that hang

    def url(self, *behaviours: str) -> str:
        return " ".join(f"http://127.0.0.1:{self.server_address[1]}/{behaviour}" for behaviour in behaviours)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *arguments: object) -> None: ...

    def do_GET(self) -> None:
        behaviour, _, rest = self.path.lstrip("/").partition("/")
        name, asked, words = rest.rpartition("/")[2], self.headers.get("Range"), behaviour.split("+")
        first = behaviour not in [name for name, _ in self.server.requests]
        self.server.requests.append((behaviour, asked))
        self.close_connection = True
        if "missing" in words or ("then_missing" in words and not first):
            self.send_error(404)
        elif "redirect" in words:
            self.send_response(302)
            self.send_header("Location", f"/good/{rest}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif "hang" in words:
            self.server.released.wait(10)
        else:
            content = PAGE if "page" in words else (self.server.others if "other" in words else self.server.files)[name]
            end = HALF if "cut_always" in words or ("cut" in words and first) else None
            self.answer(content, None if {"no_range", "page"} & {*words} else asked, end, "no_length" not in words)

    def answer(self, content: bytes, asked: str | None, end: int | None, length: bool) -> None:
        """Send content from the byte that `asked` names; break the connection after `end` bytes of it."""
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        beyond = asked is not None and start >= len(content)
        rest = b"" if beyond else content[start:]
        self.send_response(416 if beyond else 206 if asked else 200)
        if asked:
            place = "*" if beyond else f"{start}-{len(content) - 1}"
            self.send_header("Content-Range", f"bytes {place}/{len(content)}")
        if length:
            self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[:end])


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


def run(script: Path, *words: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    quick = {"FETCH_TIMEOUT": "1", "FETCH_PAUSE": "0", "FETCH_TRIES": "2"}
    return subprocess.run(
        [str(script), *words], env=kept | quick | variables, cwd=cwd, capture_output=True, text=True, timeout=30
    )


def expectation(directory: Path, files: dict[str, bytes], digests: bool = True) -> str:
    """A file with lines "SIZE SHA256 NAME" for the stand-ins."""
    path = directory / "expected"
    lines = [
        f"{len(data)} {hashlib.sha256(data).hexdigest() if digests else '-'} {name}" for name, data in files.items()
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


class Weights:
    """One directory for weights, and runs of the script that fill it."""

    def __init__(self, directory: Path, server: Server) -> None:
        self.directory, self.server = directory / "weights", server
        self.directory.mkdir()
        self.digests = expectation(directory, server.files)
        self.file, self.part = self.directory / NAME, self.directory / f"{NAME}.part"

    def run(self, *behaviours: str, names: tuple[str, ...] = (), **variables: str) -> subprocess.CompletedProcess[str]:
        places = {"DARKNET_URL": self.server.url(*behaviours), "DARKNET_DIRECTORY": str(self.directory)}
        return run(WEIGHTS_SCRIPT, *names, **(places | {"DARKNET_DIGESTS": self.digests} | variables))

    def assert_complete(self, result: subprocess.CompletedProcess[str]) -> None:
        assert result.returncode == 0, result.stderr
        assert self.file.read_bytes() == WEIGHTS and not self.part.exists()


@pytest.fixture
def weights(tmp_path: Path, server: Server) -> Weights:
    return Weights(tmp_path, server)


# Weights


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("behaviour", ["redirect", "cut_always", "cut+no_length", "cut+no_range"])
def test_what_can_be_had_is_had(weights: Weights, behaviour: str, tool: str) -> None:
    weights.assert_complete(weights.run(behaviour, FETCH_TOOL=tool, FETCH_TRIES="4"))


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [("missing", "404|answers with an error"), ("page", "header"), ("other", "SHA-256"), ("hang", "no data")],
)
def test_what_is_wrong_is_refused(weights: Weights, behaviour: str, reason: str, tool: str) -> None:
    result = weights.run(behaviour, FETCH_TOOL=tool, FETCH_TRIES="1")
    assert result.returncode == 1 and list(weights.directory.iterdir()) == []
    (line,) = [
        line for line in result.stderr.splitlines() if line.startswith(f"  {weights.server.url(behaviour)}/{NAME}")
    ]
    assert re.search(reason, line)
    assert "without a network" in result.stderr and str(weights.directory) in result.stderr


def test_addresses_are_tried_in_turn(weights: Weights) -> None:
    closed = "http://127.0.0.1:9"  # nothing listens there
    mirrors = weights.server.url("missing", "page", "other", "good")
    weights.assert_complete(weights.run(DARKNET_URL=f"{closed} {mirrors}"))
    assert list(dict.fromkeys(name for name, _ in weights.server.requests)) == ["missing", "page", "other", "good"]


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("behaviours", [("cut",), ("cut+then_missing", "good")], ids=["same address", "next address"])
def test_a_cut_file_is_continued(weights: Weights, behaviours: tuple[str, ...], tool: str) -> None:
    weights.assert_complete(weights.run(*behaviours, FETCH_TOOL=tool))
    assert weights.server.requests[0] == (behaviours[0], None)
    assert weights.server.requests[-1] == (behaviours[-1], f"bytes={HALF}-")


def test_a_cut_file_is_continued_by_the_next_run(weights: Weights) -> None:
    assert weights.run("cut+then_missing").returncode == 1
    assert weights.part.read_bytes() == WEIGHTS[:HALF] and not weights.file.exists()
    weights.assert_complete(weights.run("good"))
    assert weights.server.requests[-1] == ("good", f"bytes={HALF}-")


@pytest.mark.parametrize("behaviour", ["good", "no_range"])
@pytest.mark.parametrize(
    "left",
    [WEIGHTS[:5000], b"!" * 20 + WEIGHTS[20:5000], WEIGHTS[:4999] + b"!", PAGE, WRONG, WEIGHTS, WEIGHTS + b"!", b""],
    ids=["right", "foreign header", "one byte wrong", "page", "complete and wrong", "complete", "too long", "empty"],
)
def test_whatever_part_is_left_the_file_is_right(weights: Weights, left: bytes, behaviour: str) -> None:
    weights.part.write_bytes(left)
    weights.assert_complete(weights.run(behaviour))


def test_a_page_sent_for_the_rest_does_no_harm(weights: Weights) -> None:
    weights.part.write_bytes(WEIGHTS[:500])  # shorter than the page
    weights.assert_complete(weights.run("page", "good"))


def test_what_is_complete_is_checked_and_kept(weights: Weights) -> None:
    weights.file.write_bytes(WEIGHTS)  # put there by hand
    weights.assert_complete(weights.run("good", FETCH_TOOL="none"))  # nothing is needed that could fetch
    assert weights.server.requests == []


@pytest.mark.parametrize("wrong", [WRONG, WEIGHTS[:-4], PAGE])
def test_a_damaged_file_is_replaced_and_kept_aside(weights: Weights, wrong: bytes) -> None:
    weights.file.write_bytes(wrong)
    weights.assert_complete(weights.run("good"))
    assert (weights.directory / f"{NAME}.damaged").read_bytes() == wrong


def test_without_a_program_that_fetches(weights: Weights, tmp_path: Path) -> None:
    needed = ["sh", "dirname", "awk", "sed", "wc", "tr", "od", "df", "rm", "mv", "mkdir", "sleep", "cut", "sha256sum"]
    if not all(map(shutil.which, needed)):
        pytest.skip("one of the usual programs is not installed")
    for name in needed:
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    result = weights.run("good", PATH=str(tmp_path))
    assert result.returncode == 1 and "neither curl nor wget is installed" in result.stderr


@pytest.mark.parametrize("name", ["yolov9.weights", f"{NAME} yolov3.weights", "../x", ""])
def test_an_unknown_name_is_refused_before_anything_is_fetched(weights: Weights, name: str) -> None:
    result = weights.run("good", names=(NAME, name))
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and "yolov3-tiny.weights" in result.stderr
    assert weights.server.requests == []


def test_several_names_and_one_failure(weights: Weights) -> None:
    weights.digests = expectation(weights.directory.parent, {NAME: WRONG, "yolov3.weights": WEIGHTS})
    assert weights.run("good", names=(NAME, "yolov3.weights")).returncode == 1
    assert (weights.directory / "yolov3.weights").read_bytes() == WEIGHTS and not weights.file.exists()


def test_without_a_digest_it_says_so_and_begins_anew(weights: Weights) -> None:
    weights.part.write_bytes(WEIGHTS[:4999] + b"!")  # nothing could prove that the whole is right
    weights.digests = expectation(weights.directory.parent, {NAME: WEIGHTS}, digests=False)
    result = weights.run("good")
    weights.assert_complete(result)
    assert "no digest is known" in result.stderr and weights.server.requests == [("good", None)]


def test_forwarder_fills_the_directory_of_the_repository(tmp_path: Path, server: Server) -> None:
    root, elsewhere = tmp_path / "a repository", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for path in (WEIGHTS_SCRIPT, ANY_SCRIPT, CATALOGUE, FORWARDER, FETCHING):
        copy = root / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    variables = {"DARKNET_URL": server.url("good"), "DARKNET_DIGESTS": expectation(tmp_path, server.files)}
    forwarder = root / FORWARDER.relative_to(REPOSITORY)
    assert run(forwarder, "yolov3.weights", cwd=elsewhere, **variables).returncode == 0
    assert (root / "models/weights/yolov3.weights").read_bytes() == WEIGHTS
    assert run(forwarder, "unknown", cwd=elsewhere, **variables).returncode == 2
    assert list(elsewhere.iterdir()) == []


# COCO


def archive(path: Path, *names: str, link: str | None = None) -> bytes:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as writer:
        for name in names:
            writer.writestr(name, os.urandom(8000) + name.encode())
        if link:
            entry = zipfile.ZipInfo(link)
            entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
            writer.writestr(entry, "/tmp")
    return path.read_bytes()


class Coco:
    """Three small archives on the server, and runs of the script."""

    def __init__(self, directory: Path, server: Server) -> None:
        self.above, self.server, self.directory = directory, server, directory / "coco"
        self.directory.mkdir()
        self.members = [f"{top}/{number}.jpg" for top in ARCHIVES.values() for number in range(2)]
        self.files = {
            name: archive(directory / name, *(member for member in self.members if member.startswith(top)))
            for name, top in ARCHIVES.items()
        }
        server.files = dict(self.files)
        self.digests = expectation(directory, self.files)

    def run(self, *behaviours: str, **variables: str) -> subprocess.CompletedProcess[str]:
        preset = {"COCO_URL": self.server.url(*behaviours), "COCO_DIGESTS": self.digests}
        counts = dict.fromkeys(("COCO_TRAIN", "COCO_VAL", "COCO_ANNOTATIONS"), "2")
        return run(COCO_SCRIPT, str(self.directory), **(preset | counts | variables))

    def assert_complete(self, result: subprocess.CompletedProcess[str]) -> None:
        assert result.returncode == 0, result.stderr
        found = {str(path.relative_to(self.directory)) for path in self.directory.rglob("*") if path.is_file()}
        markers = [f".complete_{name}" for name in ARCHIVES]
        assert {name for name in found if not name.endswith(".damaged")} == {*self.members, *markers}


@pytest.fixture
def coco(tmp_path: Path, server: Server) -> Coco:
    return Coco(tmp_path, server)


@needs_unzip
def test_coco_is_had_once(coco: Coco) -> None:
    coco.assert_complete(coco.run("missing", "page", "cut", "redirect"))
    coco.server.requests.clear()
    coco.assert_complete(coco.run("hang"))
    assert coco.server.requests == []  # what is complete is not asked for again


@needs_unzip
@pytest.mark.parametrize("behaviour", ["missing", "page"])
def test_coco_that_cannot_be_had(coco: Coco, behaviour: str) -> None:
    result = coco.run(behaviour, FETCH_TRIES="1")
    assert result.returncode == 1 and list(coco.directory.iterdir()) == []
    assert "without a network" in result.stderr and f"{coco.server.url(behaviour)}/annotations/" in result.stderr


@needs_unzip
def test_coco_continues_and_replaces_parts(coco: Coco) -> None:
    first, second, third = ARCHIVES
    (coco.directory / f"{first}.part").write_bytes(coco.files[first][:5000])
    (coco.directory / f"{second}.part").write_bytes(PAGE)
    (coco.directory / f"{third}.part").write_bytes(coco.files[third][:4999] + b"!")
    coco.assert_complete(coco.run("good"))
    assert [asked for _, asked in coco.server.requests] == ["bytes=5000-", None, "bytes=5000-", None]


@needs_unzip
def test_coco_from_archives_put_there_by_hand(coco: Coco) -> None:
    for name, data in coco.files.items():
        (coco.directory / name).write_bytes(data if name != "val2017.zip" else data[:-30])
    coco.assert_complete(coco.run("good"))
    assert len(coco.server.requests) == 1  # only the damaged one
    assert (coco.directory / "val2017.zip.damaged").exists()


@needs_unzip
@pytest.mark.parametrize(
    ("names", "link"),
    [
        (("val2017/0.jpg", "../outside.jpg"), None),
        (("val2017/0.jpg", "val2017/../../outside.jpg"), None),
        (("val2017/0.jpg", "/tmp/outside_of_coco.jpg"), None),
        (("val2017/0.jpg", "train2017/0.jpg"), None),
        (("val2017/0.jpg",), "val2017/1.jpg"),
        (("val2017/0.jpg", "val2017/1.jpg", "val2017/2.jpg"), None),
    ],
)
def test_coco_archive_with_foreign_content_is_refused(coco: Coco, names: tuple[str, ...], link: str | None) -> None:
    coco.server.others = coco.files | {"val2017.zip": archive(coco.above / "evil.zip", *names, link=link)}
    coco.digests = expectation(coco.above, coco.server.others)  # as if the digest were that of the evil one
    before = {path for path in coco.above.rglob("*") if coco.directory not in path.parents}
    result = coco.run("other")
    assert result.returncode == 1
    assert re.search("does not lie in|symbolic link|holds 3 files", result.stderr)
    assert not (coco.directory / "val2017").exists() and not Path("/tmp/outside_of_coco.jpg").exists()
    assert {path for path in coco.above.rglob("*") if coco.directory not in path.parents} == before


@needs_unzip
def test_coco_archive_that_is_damaged_is_fetched_anew(coco: Coco) -> None:
    damaged = bytearray(coco.files["train2017.zip"])
    damaged[4000] ^= 1  # in the middle of a picture: only its checksum tells
    coco.server.others = coco.files | {"train2017.zip": bytes(damaged)}
    coco.digests = expectation(coco.above, coco.files, digests=False)
    result = coco.run("other", "good")
    coco.assert_complete(result)
    assert "a damaged zip archive" in result.stderr


@needs_unzip
def test_a_full_disk_is_seen_before_the_download(coco: Coco, weights: Weights) -> None:
    Path(coco.digests).write_text("".join(f"{10**16} - {name}\n" for name in (*ARCHIVES, NAME)))
    for result in (coco.run("good"), weights.run("good", DARKNET_DIGESTS=coco.digests)):
        assert result.returncode == 1 and "KiB free" in result.stderr
    assert coco.server.requests == []
