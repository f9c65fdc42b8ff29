"""Class names in figures: a font that has their letters where one is installed, else escapes."""

import contextlib
import functools
import logging
from collections.abc import Iterable

from detection.errors import say

# Families that have Chinese, Japanese and Korean, or most of Unicode; tried before all others.
WIDE_FAMILIES = ("Noto Sans CJK", "Source Han Sans", "WenQuanYi", "Droid Sans Fallback", "Arial Unicode", "Unifont")
NOT_DRAWABLE = ("Emoji", "Last Resort", "LastResort")  # bitmaps that matplotlib cannot draw; boxes instead of letters
PLAIN_WEIGHTS = ("400", "500", "normal", "regular", "medium", "book", "roman")
MOST_FALLBACKS = 3
ADVICE = "install a font that has them (Debian: apt-get install fonts-noto-cjk) to see the letters"


def printable(text: str) -> str:
    """Replace unprintable characters, which names from files may contain, by question marks."""
    return "".join(character if character.isprintable() else "?" for character in text)


def figure_names(names: Iterable[str]) -> list[str]:
    """Return class names as matplotlib draws them: call it before the figure is made.

    Fonts that have letters of the names become fallbacks of matplotlib's own. Letters that no installed font has are
    written as \\u732b, and stderr says once which font to install.
    """
    names = [printable(name) for name in names]
    lacking = _add_fonts(frozenset(letter for letter in "".join(names) if ord(letter) > 127))
    escaped = ["".join(_escape(letter) if letter in lacking else letter for letter in name) for name in names]
    return [name.replace("$", r"\$") for name in escaped]  # no formula


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


@functools.cache
def _add_fonts(letters: frozenset[str]) -> frozenset[str]:
    """Make installed fonts that have the letters fallbacks of the default font; returns the letters that none has."""
    import matplotlib

    families = list(matplotlib.rcParams["font.family"])
    missing = set(letters) - _letters_of(_path_of_default())
    for family, path in _installed() if missing else ():
        if len(families) > MOST_FALLBACKS or not missing:
            break
        if found := missing & _letters_of(path):
            missing -= found
            families += [family] if family not in families else []
    matplotlib.rcParams["font.family"] = families
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # fallbacks have one weight only; it warns
    if missing:
        shown = " ".join(map(_escape, sorted(missing)[:5]))
        say(f"note: no installed font has {len(missing)} letters of class names ({shown}); {ADVICE}", error=True)
    return frozenset(missing)


def _path_of_default() -> str:
    from matplotlib import font_manager

    return str(font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans")))


def _installed() -> list[tuple[str, str]]:
    """List (family, path) of the fonts of this machine, those with many letters first."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    known = {entry.fname for entry in manager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in known:  # installed after matplotlib made its list
            with contextlib.suppress(RuntimeError, OSError, ValueError):
                manager.addfont(path)
    plain = [entry for entry in manager.ttflist if entry.style == "normal" and str(entry.weight) in PLAIN_WEIGHTS]
    fonts = {entry.name: entry.fname for entry in plain if not any(word in entry.name for word in NOT_DRAWABLE)}

    def rank(item: tuple[str, str]) -> tuple[bool, str]:
        return not item[0].startswith(WIDE_FAMILIES), item[0]

    return sorted(fonts.items(), key=rank)


@functools.cache
def _letters_of(path: str) -> frozenset[str]:
    from matplotlib import font_manager

    try:
        return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
    except (RuntimeError, OSError):
        return frozenset()
