"""docs/reliability.md is true: its rows name tests that exist, fault tests have a row, \\* marks the guarded ones."""

import ast
import re
from pathlib import Path

FAULTS = Path(__file__).resolve().parent
TESTS = FAULTS.parent
TABLE = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")


def functions_of(path: Path) -> dict[str, ast.FunctionDef]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name: node for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


HERE = {name: node for path in FAULTS.glob("test_*.py") for name, node in functions_of(path).items()}
FAULT_TESTS = {name: node for name, node in HERE.items() if re.match(r"test_[A-G]\d\d_", name)}
ROWS = {match[1]: row for row in TABLE.splitlines() if (match := re.match(r"\| ([A-G]\d\d)(?:\\\*)? \|", row))}


def ids_of(name: str) -> list[str]:
    return re.findall(r"(?<=_)[A-G]\d\d(?=_)", name)


def test_every_row_names_tests_that_exist_or_says_why_not() -> None:
    assert len(ROWS) > 80
    for id_, row in ROWS.items():
        named = re.findall(r"`(?:(test_\w+\.py)::)?(test_\w+)`", row)
        assert named or "not run" in row, id_
        for file, name in named:
            found = {name for path in TESTS.rglob(file) for name in functions_of(path)} if file else HERE
            assert name in found, (id_, name)


def test_every_fault_test_stands_in_its_row_with_a_star_if_it_has_a_guard() -> None:
    assert len(FAULT_TESTS) > 80
    guarded = set()
    for name, node in FAULT_TESTS.items():
        assert any(f"`{name}`" in ROWS[id_] for id_ in ids_of(name)), name
        if any(ast.unparse(mark).startswith("pytest.mark.guard(") for mark in node.decorator_list):
            guarded.update(ids_of(name))
    assert guarded == {id_ for id_, row in ROWS.items() if row.startswith(f"| {id_}\\* |")}
