"""The tables of tests/README.md name tests that exist, all promises in order, and the list of mutations."""

import ast
import re

import pytest
from conftest import ROOT

TEXT = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
PROMISES = TEXT[TEXT.index("## The promises") : TEXT.index("## Mutations")]
ROWS = [
    [cell.strip() for cell in row.split("|")[1:-1]]
    for row in PROMISES.splitlines()
    if row[:1] == "|"
]
NODES = sorted(set(re.findall(r"(tests/[\w/]+\.py)::(\w+)", TEXT)))


@pytest.mark.parametrize("node", NODES, ids="::".join)
def test_a_test_that_is_named_exists(node):
    file, name = node
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {part.name for part in tree.body if isinstance(part, ast.FunctionDef)}


def test_every_promise_has_a_figure_and_a_command():
    head, _, *rows = ROWS
    assert head == ["#", "promise", "figure to show", "measured", "command"]
    numbers = [int(row[0]) for row in rows if row[0]]
    assert numbers[:13] == list(range(1, 14))
    assert numbers == sorted(set(numbers))
    for *_, measured, command in rows:
        assert measured
        assert re.fullmatch(r"`(tests/[\w/]+\.py::\w+ ?)+`", command), command


def test_every_file_that_is_linked_or_run_exists():
    named = re.findall(r"\]\(([^)]+)\)", TEXT) + [
        "../" + f for f in re.findall(r"tests/\w+/\w+\.py", TEXT)
    ]
    assert named
    assert [name for name in named if not (ROOT / "tests" / name).exists()] == []
