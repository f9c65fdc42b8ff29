"""The scripts that draw the figures of the documentation."""

from pathlib import Path

import pytest

from docs import draw_architecture


def test_architecture_states_the_published_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of YOLOv3 at 416 px: YOLOv3, table 1 and section 2.3; yolov3.cfg of Darknet."""
    figures = []
    monkeypatch.setattr(draw_architecture, "save_figure", lambda path, figure: figures.append((path, figure)))
    monkeypatch.chdir(tmp_path)
    draw_architecture.main()
    ((path, figure),) = figures
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert path == Path("docs/architecture.png")
    for shape in ("32 × 416 × 416", "384 × 52 × 52", "768 × 26 × 26", "255 × 13 × 13", "512 × 13 × 13"):
        assert shape in texts
    for text in ("256 × 52 × 52    stride 8", "8,112 predictions", "2,028 predictions", "507 predictions"):
        assert text in texts
    assert "stage 3: 3×3, 256 /2, 8 residual blocks" in texts and "1×1, 256, upsampled ×2" in texts
    assert "75 convolutions" in figure.axes[0].get_title() and "61,949,149" in figure.axes[0].get_title()
