"""The script that fetches weights, and whether this machine can run it."""

import shutil

import pytest

from tests.support.paths import REPOSITORY

SCRIPT = REPOSITORY / "models/weights/download_weights.sh"
needs_tools = pytest.mark.skipif(
    not shutil.which("sh") or not (shutil.which("curl") or shutil.which("wget")), reason="needs sh and curl or wget"
)
