"""JPEG decoders: the same pixels and the same verdicts from each."""

import importlib.util
import io
import sys
import types
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from detection.config.loading import complete_settings
from detection.config.settings import Settings
from detection.data.build import build_datasets
from detection.data.image_file import choose_decoder, decode_with_simplejpeg, describe_decoder, read_image
from detection.errors import DataReadError, SettingsError
from tests.support.paths import ARGS
from tests.support.pictures import oriented

Load = Callable[..., Settings]


needs_simplejpeg = pytest.mark.skipif(
    importlib.util.find_spec("simplejpeg") is None, reason="simplejpeg is not installed"
)


def jpeg(width: int = 97, height: int = 61, mode: str = "RGB", seed: int = 0, **options: object) -> bytes:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    pixels = cv2.add(pixels, generator.integers(0, 30, pixels.shape, dtype=np.uint8))
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


KINDS = {
    "quality 50": {"quality": 50},
    "chroma whole": {"subsampling": 0},
    "chroma half": {"subsampling": 1},
    "chroma quarter": {"subsampling": 2},
    "progressive": {"progressive": True},
    "grey": {"mode": "L"},
    "CMYK": {"mode": "CMYK"},
    "one pixel": {"width": 1, "height": 1},
    "turned": {"exif": oriented(6)},
    "not turned": {"exif": oriented(1)},
}


@needs_simplejpeg
@pytest.mark.parametrize("kind", KINDS)
def test_every_decoder_gives_the_same_pixels(tmp_path: Path, kind: str) -> None:
    for seed in range(3):
        path = tmp_path / f"{seed}.jpg"
        path.write_bytes(jpeg(seed=seed, **KINDS[kind]))
        assert np.array_equal(read_image(path, "simplejpeg"), read_image(path, "opencv"))


@needs_simplejpeg
def test_real_photographs(shared_data: Callable[[str], Path]) -> None:
    for path in sorted((shared_data("coco_mini") / "train").glob("*.jpg"))[:20]:
        assert np.array_equal(read_image(path, "simplejpeg"), read_image(path, "opencv"))


@needs_simplejpeg
def test_a_plain_jpeg_is_not_left_to_opencv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg())
    expected = read_image(path)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: None)
    assert np.array_equal(read_image(path, "simplejpeg"), expected)
    decoded = decode_with_simplejpeg(np.frombuffer(path.read_bytes(), np.uint8).copy())
    assert decoded is not None and decoded.flags.c_contiguous and decoded.flags.writeable


def verdict(path: Path, decoder: str) -> tuple[bytes, str]:
    try:
        return read_image(path, decoder).tobytes(), ""
    except DataReadError as error:
        return b"", error.line


@needs_simplejpeg
@pytest.mark.filterwarnings("error")
def test_damaged_files_are_judged_alike(tmp_path: Path) -> None:
    """200 files with bytes exchanged, cut out or cut off: refused by both with one line, or of the same pixels."""
    generator, path, refused = np.random.default_rng(0), tmp_path / "a.jpg", 0
    for number in range(200):
        content = bytearray(jpeg(seed=number % 5, progressive=bool(number % 2)))
        first = int(generator.integers(2, len(content) - 2))
        if number % 4 == 0:
            del content[first:]
        elif number % 4 == 1:
            del content[first : first + 100]
        else:
            content[first] = int(generator.integers(256))
        path.write_bytes(content)
        assert verdict(path, "simplejpeg") == verdict(path, "opencv")
        refused += verdict(path, "opencv")[0] == b""
    assert 50 <= refused <= 150


def test_the_choice(monkeypatch: pytest.MonkeyPatch, default_settings: Load, drawn_dataset: Path) -> None:
    """With a stand-in for the package, so that it need not be installed; None in its place makes the import fail."""
    monkeypatch.setitem(sys.modules, "simplejpeg", types.ModuleType("simplejpeg"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"9.8 of {name}")
    assert [choose_decoder(name) for name in ("auto", "opencv", "simplejpeg")] == ["simplejpeg", "opencv", "simplejpeg"]
    assert describe_decoder("opencv") == f"OpenCV {cv2.__version__}"
    assert describe_decoder("simplejpeg") == f"simplejpeg 9.8 of simplejpeg, OpenCV {cv2.__version__}"
    for decoder in ("opencv", "simplejpeg"):
        data = default_settings(f"data.root={drawn_dataset}", f"data.decoder={decoder}").data
        assert [dataset.decoder for dataset in build_datasets(data, 0, None)] == [decoder, decoder]

    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    assert choose_decoder("auto") == "opencv"
    with pytest.raises(SettingsError, match=r"data\.decoder: simplejpeg is not installed"):
        choose_decoder("simplejpeg")


def test_a_checkpoint_from_before_the_choice_continues_with_opencv(default_settings: Load) -> None:
    tree = default_settings().model_dump(mode="json")
    assert complete_settings(tree, ARGS).data.decoder == "auto"
    del tree["data"]["decoder"]
    assert complete_settings(tree, ARGS).data.decoder == "opencv"


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
@pytest.mark.parametrize("kind", ["DIB", "BMP"])
def test_a_dib_is_read_with_and_without_its_file_header(tmp_path: Path, mode: str, kind: str) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (13, 17, 3), np.uint8)).convert(mode)
    path = tmp_path / "a.dib"
    picture.save(path, kind)
    assert (path.read_bytes()[:2] == b"BM") == (kind == "BMP")
    assert np.array_equal(read_image(path), np.asarray(picture.convert("RGB")))
    if kind == "DIB":
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(DataReadError, match="damaged"):
            read_image(path)
