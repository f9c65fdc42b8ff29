"""docs/reliability.md is true: every row is there, every test that it names exists, the twenty have guards."""

import ast
import re
from pathlib import Path

import pytest

FAULTS = Path(__file__).resolve().parent
TESTS = FAULTS.parent
TABLE = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = {"A": 22, "B": 11, "C": 14, "D": 16, "E": 14, "F": 6}
# The twenty that matter most: any test of a group carries the guard.
TWENTY = [
    *(["D07", "D01", "C01|C04", "A01", "A02|A03", "A09|A10", "A16", "A12", "A07|E09", "B01"]),
    *(["B04", "D02|D03", "D05|D06", "E07", "E08", "D11|E11", "E03", "A14", "A08", "C08"]),
]


def functions_of(path: Path) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name: node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


HERE = {name: node for path in FAULTS.glob("test_*.py") for name, node in functions_of(path).items()}


def table_rows() -> dict[str, list[str]]:
    lines = [line for line in TABLE.splitlines() if re.match(r"\| [A-F]\d\d", line)]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cell[0].removesuffix("\\*"): cell for cell in cells}


def test_every_row_is_there_once_and_names_a_test_or_a_reason() -> None:
    rows = table_rows()
    assert list(rows) == [f"{letter}{number:02}" for letter, count in ROWS.items() for number in range(1, count + 1)]
    for name, (_, fault, happens, _, test) in rows.items():
        assert fault and happens and ("`test_" in test or (test == "not run here" and "not run: " in happens)), name


def test_every_named_test_exists_and_every_test_is_named() -> None:
    named = re.findall(r"`((?:test_\w+\.py::)?test_\w+)`", TABLE)
    for name in named:
        file, _, function = name.rpartition("::")
        assert function in (functions_of(TESTS / file) if file else HERE), name
    ours = {name for name in HERE if re.match(r"test_[A-F]\d\d_", name)}
    assert ours <= set(named), ours - set(named)


def test_names_carry_the_ids_of_their_rows() -> None:
    for id_, row in table_rows().items():
        for name in re.findall(r"`(test_[A-F]\d\d_\w+)`", row[-1]):
            assert id_ in name or id_ in ("B10", "C04", "D08", "D12", "E09"), (id_, name)


@pytest.mark.parametrize("group", TWENTY)
def test_the_twenty_run_once_without_their_guard(group: str) -> None:
    ids = group.split("|")
    assert len(TWENTY) == 20
    for id_ in ids:
        assert f"| {id_}\\* |" in TABLE
    guarded = [
        name
        for name, node in HERE.items()
        if any(f"_{id_}_" in name for id_ in ids)
        and any(ast.unparse(mark).startswith("pytest.mark.guard(") for mark in node.decorator_list)
    ]
    assert guarded, group
