"""The download scripts against a local server that fails in the ways real ones do; small files stand in."""

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
FORWARDER = REPOSITORY / "yolo-v3/models/weights/download_darknet_weights.sh"
COCO_SCRIPT = REPOSITORY / "data/download_coco.sh"
FETCHING = REPOSITORY / "data/fetching.sh"
NAME = "darknet53.conv.74"
HEADER = struct.pack("<3iQ", 0, 2, 0, 32013312)  # major, minor, revision, images seen
WEIGHTS = HEADER + bytes(range(256)) * 80  # 20,500 bytes
WRONG = WEIGHTS[:-1] + b"!"  # right size and header
PAGE = b"<!DOCTYPE html><html><title>Survival strategies</title></html>\n" * 20
HALF = 10000
ARCHIVES = ("annotations_trainval2017.zip", "val2017.zip", "train2017.zip")

TOOLS = [
    pytest.param(name, marks=pytest.mark.skipif(not shutil.which(name), reason=f"{name} is not installed"))
    for name in ("curl", "wget")
]
pytestmark = [
    pytest.mark.skipif(not shutil.which("sh"), reason="needs a POSIX shell"),
    pytest.mark.skipif(not (shutil.which("curl") or shutil.which("wget")), reason="neither curl nor wget is installed"),
]
needs_unzip = pytest.mark.skipif(not shutil.which("unzip"), reason="unzip is not installed")


class Server(http.server.ThreadingHTTPServer):
    """Answers http://.../BEHAVIOUR/any/FILE; `files` holds the right bytes, `requests` what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {NAME: WEIGHTS, "yolov3.weights": WEIGHTS}
        self.other: dict[str, bytes] = {NAME: WRONG}  # what the behaviour "other" sends
        self.requests: list[tuple[str, str | None]] = []  # (behaviour, Range)
        self.released = threading.Event()  # ends those that hang

    def url(self, *behaviours: str) -> str:
        return " ".join(f"http://127.0.0.1:{self.server_address[1]}/{behaviour}" for behaviour in behaviours)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *arguments: object) -> None: ...

    def do_GET(self) -> None:
        behaviour, _, rest = self.path.lstrip("/").partition("/")
        content = self.server.files[rest.rpartition("/")[2]]
        asked = self.headers.get("Range")
        first = behaviour not in [name for name, _ in self.server.requests]
        self.server.requests.append((behaviour, asked))
        self.close_connection = True
        match behaviour:
            case "missing":
                self.send_error(404)
            case "redirect":
                self.send_response(302)
                self.send_header("Location", f"/good/{rest}")
                self.send_header("Content-Length", "0")
                self.end_headers()
            case "page":
                self.answer(PAGE, None)
            case "other":
                self.answer(self.server.other[rest.rpartition("/")[2]], asked)
            case "hang":
                self.server.released.wait(10)
            case "cut_once":
                self.answer(content, asked, end=HALF if first else None)
            case "cut_always":
                self.answer(content, asked, end=6000)
            case "cut_then_missing":
                if first:
                    self.answer(content, asked, end=HALF)
                else:
                    self.send_error(404)
            case "cut_without_length":
                self.answer(content, asked, end=HALF if first else None, length=False)
            case "no_range":
                self.answer(content, None)
            case "cut_no_range":
                self.answer(content, None, end=HALF if first else None)
            case "good":
                self.answer(content, asked)
            case _:
                raise AssertionError(behaviour)

    def answer(self, content: bytes, asked: str | None, end: int | None = None, length: bool = True) -> None:
        """Send content from the byte that `asked` names; break the connection after `end` bytes of it."""
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if asked and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][:end])


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
        preset = {
            "DARKNET_URL": self.server.url(*behaviours),
            "DARKNET_DIGESTS": self.digests,
            "DARKNET_DIRECTORY": str(self.directory),
        }
        return run(WEIGHTS_SCRIPT, *names, **(preset | variables))

    def assert_complete(self, result: subprocess.CompletedProcess[str]) -> None:
        assert result.returncode == 0, result.stderr
        assert self.file.read_bytes() == WEIGHTS
        assert not self.part.exists()
        assert f"{NAME}: complete" in result.stderr


@pytest.fixture
def weights(tmp_path: Path, server: Server) -> Weights:
    return Weights(tmp_path, server)


# Weights: every way of failing, with both programs


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("behaviour", ["good", "redirect", "cut_always", "cut_without_length", "cut_no_range"])
def test_what_can_be_had_is_had(weights: Weights, behaviour: str, tool: str) -> None:
    weights.assert_complete(weights.run(behaviour, FETCH_TOOL=tool))


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("missing", "404|answers with an error"),
        ("page", "not the header"),
        ("other", "SHA-256 is"),
        ("hang", "no data for 1 s"),
    ],
)
def test_what_is_wrong_is_refused(weights: Weights, behaviour: str, said: str, tool: str) -> None:
    result = weights.run(behaviour, FETCH_TOOL=tool, FETCH_TRIES="1")
    assert result.returncode == 1
    assert list(weights.directory.iterdir()) == []
    address = f"{weights.server.url(behaviour)}/{NAME}"
    (line,) = [line for line in result.stderr.splitlines() if line.startswith(f"  {address}: ")]
    assert re.search(said, line)
    assert "without a network" in result.stderr and str(weights.directory) in result.stderr


@pytest.mark.parametrize("tool", TOOLS)
def test_addresses_are_tried_in_turn(weights: Weights, tool: str) -> None:
    closed = "http://127.0.0.1:9"  # nothing listens there
    variables = {
        "FETCH_TOOL": tool,
        "DARKNET_URL": f"{closed} {weights.server.url('missing', 'page', 'other', 'good')}",
    }
    weights.assert_complete(weights.run(**variables))
    assert list(dict.fromkeys(name for name, _ in weights.server.requests)) == ["missing", "page", "other", "good"]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_cut_file_is_continued_by_the_same_address(weights: Weights, tool: str) -> None:
    weights.assert_complete(weights.run("cut_once", FETCH_TOOL=tool))
    assert weights.server.requests == [("cut_once", None), ("cut_once", f"bytes={HALF}-")]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_cut_file_is_continued_by_the_next_address(weights: Weights, tool: str) -> None:
    weights.assert_complete(weights.run("cut_then_missing", "good", FETCH_TOOL=tool))
    assert weights.server.requests[-1] == ("good", f"bytes={HALF}-")


def test_a_cut_file_is_continued_by_the_next_run(weights: Weights) -> None:
    assert weights.run("cut_then_missing").returncode == 1
    assert weights.part.read_bytes() == WEIGHTS[:HALF] and not weights.file.exists()
    weights.assert_complete(weights.run("good"))
    assert weights.server.requests[-1] == ("good", f"bytes={HALF}-")


@pytest.mark.parametrize(
    "left",
    [
        pytest.param(WEIGHTS[:5000], id="right"),
        pytest.param(WRONG[::-1][:20] + WEIGHTS[20:5000], id="foreign header"),
        pytest.param(WEIGHTS[:4999] + b"!", id="one byte wrong"),
        pytest.param(PAGE, id="page"),
        pytest.param(WRONG, id="complete and wrong"),
        pytest.param(WEIGHTS, id="complete and right"),
        pytest.param(WEIGHTS + b"!", id="too long"),
        pytest.param(b"", id="empty"),
    ],
)
def test_whatever_part_is_left_the_file_is_right(weights: Weights, left: bytes) -> None:
    weights.part.write_bytes(left)
    weights.assert_complete(weights.run("good"))


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("left", [WEIGHTS[:5000], WEIGHTS[:4999] + b"!"])
def test_a_server_that_ignores_the_range_does_no_harm(weights: Weights, left: bytes, tool: str) -> None:
    weights.part.write_bytes(left)
    weights.assert_complete(weights.run("no_range", FETCH_TOOL=tool))


def test_a_page_sent_for_the_rest_does_no_harm(weights: Weights) -> None:
    weights.part.write_bytes(WEIGHTS[:500])  # shorter than the page
    weights.assert_complete(weights.run("page", "good"))


# Weights: what is there, what is asked for


def test_what_is_complete_is_checked_and_kept(weights: Weights) -> None:
    weights.file.write_bytes(WEIGHTS)  # put there by hand
    weights.assert_complete(weights.run("good", FETCH_TOOL="none"))  # nothing is needed that could fetch
    assert weights.server.requests == []


def test_the_program_that_is_installed_is_used(weights: Weights, tmp_path: Path) -> None:
    needed = ["sh", "dirname", "awk", "sed", "wc", "tr", "od", "df", "rm", "mv", "mkdir", "sleep", "cut", "sha256sum"]
    if not shutil.which("wget") or not all(map(shutil.which, needed)):
        pytest.skip("wget or one of the usual programs is not installed")
    for name in needed:
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    result = weights.run("good", PATH=str(tmp_path))
    assert result.returncode == 1 and "neither curl nor wget is installed" in result.stderr
    (tmp_path / "wget").symlink_to(str(shutil.which("wget")))
    weights.assert_complete(weights.run("good", PATH=str(tmp_path)))
    assert weights.run("good", FETCH_TOOL="aria2c", names=("yolov3.weights",)).returncode == 1


@pytest.mark.parametrize("wrong", [WRONG, WEIGHTS[:-4], PAGE])
def test_a_damaged_file_is_replaced_and_kept_aside(weights: Weights, wrong: bytes) -> None:
    weights.file.write_bytes(wrong)
    weights.assert_complete(weights.run("good"))
    assert (weights.directory / f"{NAME}.damaged").read_bytes() == wrong


def test_an_unknown_name_is_refused_before_anything_is_fetched(weights: Weights) -> None:
    for name in ("yolov9.weights", f"{NAME} yolov3.weights", "../x", ""):
        result = weights.run("good", names=(NAME, name))
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1 and "yolov3-tiny.weights" in result.stderr
    assert weights.server.requests == []


def test_several_names_and_one_failure(weights: Weights) -> None:
    weights.digests = expectation(weights.directory.parent, {NAME: WRONG, "yolov3.weights": WEIGHTS})
    result = weights.run("good", names=(NAME, "yolov3.weights"))
    assert result.returncode == 1
    assert (weights.directory / "yolov3.weights").read_bytes() == WEIGHTS and not weights.file.exists()


def test_without_a_digest_it_says_so_and_begins_anew(weights: Weights) -> None:
    weights.part.write_bytes(WEIGHTS[:4999] + b"!")  # nothing could prove that the whole is right
    weights.digests = expectation(weights.directory.parent, {NAME: WEIGHTS}, digests=False)
    result = weights.run("good")
    weights.assert_complete(result)
    assert "no digest is known: only size and header are checked" in result.stderr
    assert weights.server.requests == [("good", None)]


def test_a_full_disk_is_seen_before_the_download(weights: Weights) -> None:
    Path(weights.digests).write_text(f"{10**17} - {NAME}\n")
    result = weights.run("good")
    assert result.returncode == 1 and "KiB free" in result.stderr
    assert weights.server.requests == []


def test_forwarder_fills_the_directory_of_the_repository(tmp_path: Path, server: Server) -> None:
    for path in (WEIGHTS_SCRIPT, FORWARDER, FETCHING):
        copy = tmp_path / "a repository" / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    root, elsewhere = tmp_path / "a repository", tmp_path / "elsewhere"
    elsewhere.mkdir()
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
        self.above, self.server = directory, server
        self.directory = directory / "coco"
        self.directory.mkdir()
        self.files = {
            name: archive(directory / name, *(f"{top}/{number}.jpg" for number in range(2)))
            for name, top in zip(ARCHIVES, ("annotations", "val2017", "train2017"), strict=True)
        }
        server.files = dict(self.files)
        self.digests = expectation(directory, self.files)

    def run(self, *behaviours: str, **variables: str) -> subprocess.CompletedProcess[str]:
        preset = {"COCO_URL": self.server.url(*behaviours), "COCO_DIGESTS": self.digests}
        counts = dict.fromkeys(("COCO_TRAIN", "COCO_VAL", "COCO_ANNOTATIONS"), "2")
        return run(COCO_SCRIPT, str(self.directory), **(preset | counts | variables))

    def assert_complete(self, result: subprocess.CompletedProcess[str]) -> None:
        assert result.returncode == 0, result.stderr
        images = {f"{top}/{number}.jpg" for top in ("annotations", "val2017", "train2017") for number in range(2)}
        markers = {f".complete_{name}" for name in ARCHIVES}
        found = {str(path.relative_to(self.directory)) for path in self.directory.rglob("*") if path.is_file()}
        assert {name for name in found if not name.endswith(".damaged")} == images | markers


@pytest.fixture
def coco(tmp_path: Path, server: Server) -> Coco:
    return Coco(tmp_path, server)


@needs_unzip
@pytest.mark.parametrize("behaviours", [("cut_no_range",), ("missing", "page", "cut_once", "redirect")])
def test_coco_is_had(coco: Coco, behaviours: tuple[str, ...]) -> None:
    coco.assert_complete(coco.run(*behaviours))
    coco.server.requests.clear()
    coco.assert_complete(coco.run("hang"))
    assert coco.server.requests == []  # what is complete is not asked for again


@needs_unzip
@pytest.mark.parametrize("behaviour", ["missing", "page"])
def test_coco_that_cannot_be_had(coco: Coco, behaviour: str) -> None:
    result = coco.run(behaviour, FETCH_TRIES="1")
    assert result.returncode == 1
    assert "without a network" in result.stderr and f"{coco.server.url(behaviour)}/annotations/" in result.stderr
    assert list(coco.directory.iterdir()) == []


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
        (coco.directory / name).write_bytes(data)
    (coco.directory / ARCHIVES[1]).write_bytes(coco.files[ARCHIVES[1]][:-30])
    coco.assert_complete(coco.run("good"))
    assert len(coco.server.requests) == 1  # only the damaged one
    assert (coco.directory / f"{ARCHIVES[1]}.damaged").exists()


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
    evil = archive(coco.above / "evil.zip", *names, link=link)
    coco.digests = expectation(
        coco.above, coco.files | {"val2017.zip": evil}
    )  # as if the digest were that of the evil one
    coco.server.other = coco.files | {"val2017.zip": evil}
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
    coco.server.other = coco.files | {"train2017.zip": bytes(damaged)}
    coco.digests = expectation(coco.above, coco.files, digests=False)
    result = coco.run("other", "good")
    coco.assert_complete(result)
    assert "a damaged zip archive" in result.stderr


@needs_unzip
def test_coco_needs_space(coco: Coco) -> None:
    for variables in ({"COCO_NEEDED_KIB": "999999999999"}, {"COCO_DIGESTS": coco.digests}):
        Path(coco.digests).write_text("".join(f"{10**16} - {name}\n" for name in ARCHIVES))
        result = coco.run("good", **variables)
        assert result.returncode == 1 and "KiB free" in result.stderr
    assert coco.server.requests == []


# The scripts as text


@pytest.mark.parametrize(
    "script", [WEIGHTS_SCRIPT, FORWARDER, COCO_SCRIPT, FETCHING], ids=lambda path: str(path.parent.name)
)
def test_scripts_are_posix_shell(script: Path) -> None:
    assert subprocess.run(["sh", "-n", str(script)]).returncode == 0
    assert os.access(script, os.X_OK) == (script != FETCHING)
    assert "local " not in script.read_text() and "[[" not in script.read_text()


@pytest.mark.parametrize("script", [WEIGHTS_SCRIPT, COCO_SCRIPT])
def test_every_address_and_digest_names_its_source(script: Path) -> None:
    lines = script.read_text().splitlines()
    stating = [
        number
        for number, line in enumerate(lines)
        if re.search(r"https?://|digest=[0-9a-f]{64}", line) and not line.lstrip().startswith("#")
    ]
    assert len(stating) >= 5
    comments = "\n".join(line for line in lines if line.lstrip().startswith("#"))
    for number in stating:
        if "://" in lines[number] or script == WEIGHTS_SCRIPT:
            above = [lines[index].strip() for index in (number - 1, number - 2)]
            assert any(line.startswith("# Source: ") for line in above), lines[number]
        else:
            assert "# Source of the digests: " in comments


def test_sizes_are_header_and_parameters() -> None:
    stated = dict(
        re.findall(r"^    (\S+)\)\n(?:        #.*\n)+        size=(\d+)", WEIGHTS_SCRIPT.read_text(), re.MULTILINE)
    )
    # Darknet-53 without its classifier: convolutions without bias, each with 4 values per channel of batch norm
    count, channels = 3 * 32 * 9 + 4 * 32, 32
    for blocks, out in ((1, 64), (2, 128), (8, 256), (8, 512), (4, 1024)):
        count += channels * out * 9 + 4 * out
        count += blocks * (out * out // 2 + 4 * out // 2 + out // 2 * out * 9 + 4 * out)
        channels = out
    assert int(stated[NAME]) == len(HEADER) + 4 * count == 162_482_580  # the length that the author's server announced
    assert int(stated["yolov3.weights"]) == 20 + 4 * 62_001_757
    assert len(stated) == 6 and all((int(size) - 20) % 4 == 0 for size in stated.values())
