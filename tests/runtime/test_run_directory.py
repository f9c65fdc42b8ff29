"""Run directories: what is refused, in one line that names what to do."""

from pathlib import Path

import pytest

from detection.errors import OutputError
from detection.runtime.run_directory import new_run_directory, writing_results


@pytest.mark.parametrize(
    ("files", "wanted", "message"),
    [
        (["out/detections.json"], "out", "--output {out} is not empty"),
        (["out/last.pt"], "out", "--output {out} is not empty; to continue that run use --resume {out}"),
        (["out"], "out", "directory {out} cannot be made: File exists"),
        (["out"], "out/below", "directory {out}/below cannot be made: Not a directory"),
    ],
)
def test_refused_directories(tmp_path: Path, files: list[str], wanted: str, message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(OutputError) as raised:
        new_run_directory(tmp_path, "name", tmp_path / wanted)
    assert str(raised.value) == message.format(out=tmp_path / "out")


def test_results_that_cannot_be_written_name_the_directory(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as raised, writing_results(tmp_path):
        (tmp_path / "gone" / "x.json").write_text("x")
    assert str(raised.value) == f"results in {tmp_path} cannot be written: No such file or directory"
    with pytest.raises(BrokenPipeError), writing_results(tmp_path):  # of a reader of stdout that has ended
        raise BrokenPipeError
