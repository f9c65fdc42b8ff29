"""What all scripts at the root have in common."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

SCRIPTS = sorted(path for path in REPOSITORY.glob("*.py") if path.name != "hubconf.py")  # read by torch.hub
# Every script in one process, since importing torch takes seconds: {name: [exit code, stdout, stderr]}
ASK_ALL = """
import contextlib, io, json, runpy, sys
answers = {}
for path in sys.argv[1:]:
    sys.argv, out, err = [path, "--help"], io.StringIO(), io.StringIO()
    sys.path[0] = path.rpartition("/")[0]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(path, run_name="__main__")
            code = None
        except SystemExit as left:
            code = left.code
    answers[path.rpartition("/")[2]] = [code, out.getvalue(), err.getvalue()]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """`--help` of every script, from a directory that has nothing to do with the repository."""
    command = [sys.executable, "-c", ASK_ALL, *map(str, SCRIPTS)]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=240, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_is_the_docstring(script: Path, helps: dict[str, tuple[int, str, str]]) -> None:
    code, out, err = helps[script.name]
    assert not code and err == "", err
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
    assert docstring is not None and docstring in out
    assert f"\npython {script.name}" in docstring, "the docstring is the command to run"
    for option in ("--config", "key.path=value"):
        assert option in out or script.name in ("compare_runs.py", "convert_dataset.py", "convert_weights.py")
