"""Switch a guard off: replace part of a function's source.

A test that passes without the guard it is about proves nothing; conftest.py runs each marked test with and without.
"""

import __future__

import functools
import importlib
import inspect
import operator
import textwrap

import pytest


def switch_off(place: str, text: str, replacement: str, patch: pytest.MonkeyPatch) -> None:
    """Replace the code object of a function, which affects all modules that imported it.

    Args:
        place: "module:function" or "module:Class.method".
        text: part of its source, which must occur there exactly once.
        replacement: of `text`.
        patch: undoes it.
    """
    module, _, path = place.partition(":")
    function = inspect.unwrap(operator.attrgetter(path)(importlib.import_module(module)))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(text) == 1, f"{place}: {text!r} occurs {source.count(text)} times; the guard has changed"
    names: dict[str, object] = {}
    flags = function.__code__.co_flags & functools.reduce(
        operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
    )
    code = compile(source.replace(text, replacement), f"<{place} without its guard>", "exec", flags, True)
    exec(code, function.__globals__, names)
    patch.setattr(function, "__code__", inspect.unwrap(names[function.__name__]).__code__)
