"""What the documentation shows is run: its Python blocks, the output printed beside them, and its completeness."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
import types
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import hamblocks
import hamblocks.testing
import hamblocks_ops
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
        check.name
        for check in checks
        if f"| `{check.name}` | {check.purpose.replace('|', chr(92) + '|')} |" not in page
    ]
    assert missing == []
    assert page.count("| `check_") == len(checks)


@pytest.mark.slow
def test_site_builds_and_documents_every_public_name(tmp_path):
    pytest.importorskip("mkdocs")
    site = tmp_path / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(site)]
    built = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    header = b"# The remainder of this file is compressed using zlib.\n"
    inventory = (site / "objects.inv").read_bytes()
    listed = zlib.decompress(inventory[inventory.index(header) + len(header) :]).decode()
    documented = {line.split(" ")[0] for line in listed.splitlines()}
    for package in (hamblocks, hamblocks_ops, hamblocks.testing):
        for name in package.__all__:
            # an op that is named like its module is listed as a member of the module
            listings = {f"{package.__name__}.{name}", f"{package.__name__}.{name}.{name}"}
            listings.add(f"{getattr(getattr(package, name), '__module__', '')}.{name}")
            assert documented & listings, (
                f"{package.__name__}.{name} is in no page of the reference"
            )
    # without this file, pages that are opened as files cannot be searched
    assert (site / "search/search_index.js").exists()
    fetched = re.compile(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']?(?:https?:)?//""")
    assert [
        str(page)
        for page in site.rglob("*.html")
        if fetched.search(page.read_text(encoding="utf-8"))
    ] == []
