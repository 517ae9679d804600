"""What the documentation shows is run: its Python blocks, and the output printed beside them."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import hamblocks.testing
from hamblocks.testing import settings

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md"])
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```$", re.M | re.S
)


class Block(NamedTuple):
    line: int
    code: str
    output: str | None


def blocks_of(page: Path) -> list[Block]:
    """The Python blocks of a page, each with the ```text block that stands right behind it, if one does."""
    source = page.read_text(encoding="utf-8")
    blocks: list[Block] = []
    behind = 0  # where the last Python block ended; 0 behind any other block
    for fence in FENCE.finditer(source):
        if fence["language"] == "python":
            blocks.append(Block(source.count("\n", 0, fence.start()) + 1, fence["body"], None))
        elif fence["language"] == "text" and behind and not source[behind : fence.start()].strip():
            blocks[-1] = blocks[-1]._replace(output=fence["body"])
        behind = fence.end() if fence["language"] == "python" else 0
    return blocks


@pytest.fixture(autouse=True)
def _as_for_a_reader():
    """The profile that a reader of the page has."""
    with settings.using(settings.chosen()._replace(profile="dev")):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_examples_run(page, monkeypatch, tmp_path):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)  # pages write files
    module = types.ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(
        sys.modules, module.__name__, module
    )  # torch.compile looks there for the globals of a function
    for block in blocks_of(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            code = compile("\n" * block.line + block.code, str(page), "exec")
            exec(code, vars(module))
        if block.output is not None:
            assert printed.getvalue().strip() == block.output.strip(), f"{page}:{block.line}"


def test_blocks_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n```python\nx = 2\n```\n\nor\n\n```text\n3\n```\n"
    )
    assert blocks_of(page) == [Block(3, "print(1)\n", "1\n"), Block(11, "x = 2\n", None)]


def test_every_check_is_listed_with_its_law():
    page = (ROOT / "docs/reference/testing.md").read_text(encoding="utf-8")
    checks = [check for checks in hamblocks.testing.CHECKS.values() for check in checks]
    missing = [
        check.name for check in checks if f"| `{check.name}` | {check.purpose} |" not in page
    ]
    assert missing == []
    assert page.count("| `check_") == len(checks)


CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(
    r"(?<![\w./:-])(?:hamblocks|ops|tests|benchmarks|examples|docs)/[\w./-]*[\w/](?![\w*])"
)
TEST = re.compile(r"(?<![\w/])([\w/]+\.py)::(test_\w+)")
WRITTEN = {"benchmarks/results/", "tests/golden/written_surprise.json"}
"""What commands of the pages write."""


def stale_names(text: str, folders: tuple[str, ...]) -> list[str]:
    """Files and tests that a page names in code or in a shell block, and that do not exist.

    A path begins at the root of the repository. Tests stand in one of the `folders`.
    """
    shell = [fence["body"] for fence in FENCE.finditer(text) if fence["language"] == "sh"]
    code = "\n".join(shell + CODE.findall(FENCE.sub("", text)))
    stale = [name for name in PATH.findall(code) if not (ROOT / name).exists()]
    for file, test in TEST.findall(code):
        found = [path for folder in folders if (path := ROOT / folder / file).exists()]
        if not any(f"def {test}(" in path.read_text(encoding="utf-8") for path in found):
            stale.append(f"{file}::{test}")
    return [name for name in stale if name not in WRITTEN]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_and_tests_exist(page):
    assert stale_names(page.read_text(encoding="utf-8"), ("", "tests", "tests/border")) == []


def test_stale_names_are_found():
    text = (
        "`docs/none.md`, `python docs/index.md`, `ops/hamblocks_ops/<op>/none.py`, docs/none.txt\n"
        "`test_docs.py::test_none` `tests/test_docs.py::test_stale_names_are_found`\n"
        "```sh\npython tests/none.py\n```\n```python\nx = 'tests/none.txt'\n```\n"
    )
    assert stale_names(text, ("", "tests")) == [
        "tests/none.py",
        "docs/none.md",
        "test_docs.py::test_none",
    ]


def test_the_layout_of_contributing_exists():
    page = (ROOT / "docs/contributing.md").read_text(encoding="utf-8")
    layout = next(fence["body"] for fence in FENCE.finditer(page) if fence["language"] == "text")
    folder, stale = "", []
    for line in layout.splitlines():
        # names of a folder, or indented below it; what they are follows after spaces
        indent, names = re.match(r"( *)(\S+(?: \S*[./]\S*)*)", line).groups()
        if len(indent) > 8 or "<" in names:
            continue
        folder = folder if indent else names
        below = [Path(folder) / name if indent else Path(name) for name in names.split()]
        stale += [str(path) for path in below if not (ROOT / path).exists()]
    assert stale == []
