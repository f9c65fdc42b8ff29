"""What all scripts at the root have in common."""

import ast
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from detection.dataset_checks.findings import KINDS
from tests.support.paths import REPOSITORY

SCRIPTS = sorted(path for path in REPOSITORY.glob("*.py"))
HELP_OF_OTHERS = ["yolo-v3/main.py"]


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, subprocess.CompletedProcess[str]]:
    """`--help` of every script, from a directory that has nothing to do with the repository."""
    directory = tmp_path_factory.mktemp("elsewhere")

    def ask(script: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, script, "--help"]
        return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=240, check=False)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip([script.name for script in SCRIPTS], pool.map(ask, SCRIPTS), strict=True))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_is_the_docstring(script: Path, helps: dict[str, subprocess.CompletedProcess[str]]) -> None:
    result = helps[script.name]
    assert result.returncode == 0 and result.stderr == "", result
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8")))
    assert docstring is not None and docstring in result.stdout
    assert f"\npython {script.name}" in docstring, "the docstring is the command to run"
    for option in ("--config", "key.path=value"):
        assert option in result.stdout or script.name in ("compare_runs.py", "convert_dataset.py")


def test_readme_counts_what_the_doctor_finds() -> None:
    assert f"{len(KINDS)} kinds of finding" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_readme_names_every_script() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert [script.name for script in SCRIPTS if f"`{script.name}`" not in readme] == []
