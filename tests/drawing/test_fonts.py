"""Class names in figures: letters from an installed font that has them, else escapes and one line of advice."""

from collections.abc import Iterator

import matplotlib
import numpy as np
import pytest

from detection.drawing import fonts
from detection.drawing.fonts import figure_names
from detection.evaluation.figures import draw_confusion

FONTS = {"Latin": set("abcé"), "Asian": set("猫犬"), "Both": set("猫кот"), "Korean": set("고")}


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose default font has abc and é alone."""
    family = list(matplotlib.rcParams["font.family"])
    monkeypatch.setattr(fonts, "_letters_of", lambda path: frozenset(FONTS[path]))
    monkeypatch.setattr(fonts, "_path_of_default", lambda: "Latin")
    monkeypatch.setattr(fonts, "_installed", lambda: [("Asian", "Asian"), ("Both", "Both"), ("Korean", "Korean")])
    fonts._add_fonts.cache_clear()
    yield
    fonts._add_fonts.cache_clear()
    matplotlib.rcParams["font.family"] = family


def test_fonts_with_the_letters_are_added(capfd: pytest.CaptureFixture[str]) -> None:
    own = list(matplotlib.rcParams["font.family"])
    assert figure_names(["cab é", "猫", "кот"]) == ["cab é", "猫", "кот"]
    assert matplotlib.rcParams["font.family"] == [*own, "Asian", "Both"], "Korean is not needed"
    assert capfd.readouterr() == ("", "")


def test_letters_without_a_font_are_escaped_and_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert figure_names(["猫 狗", "$5", "a\nb"]) == ["猫 \\u72d7", r"\$5", "a?b"]
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "fonts-noto-cjk" in err and "\\u72d7" in err


@pytest.mark.filterwarnings("error")  # matplotlib warns of a letter that its fonts lack
def test_a_figure_with_foreign_names_has_no_empty_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    fonts._add_fonts.cache_clear()
    names = ["猫", "犬, 小型", "고양이", "кот", "\U00013000", "$a$"]
    assert draw_confusion(np.eye(7, dtype=np.int64), names, 0.3).std() > 0
