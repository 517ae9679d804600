"""The documentation builds: its pages have every public name and no dead link, and fetch nothing."""

from __future__ import annotations

import posixpath
import shutil
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import hamblocks
import hamblocks.testing
import hamblocks_ops

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built pages, of a copy: Zensical writes only inside of the folder of its settings."""
    pytest.importorskip("zensical")
    project = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "zensical.toml", project)
    shutil.copytree(ROOT / "docs", project / "docs")
    for sources in ("hamblocks", "ops"):
        (project / sources).symlink_to(ROOT / sources)
    build = [sys.executable, "-m", "zensical", "build", "--strict"]
    built = subprocess.run(build, cwd=project, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return project / "site"


class Page(HTMLParser):
    """The anchors of a built page, the links on it, and the files that it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                (self.links if tag == "a" else self.loaded).add(value)


@pytest.fixture(scope="module")
def pages(site):
    """The pages by their paths. 404.html is left out: a server shows it, from any address."""
    built = {path.relative_to(site).as_posix(): Page(path) for path in site.rglob("*.html")}
    del built["404.html"]
    return built


@pytest.mark.slow
def test_every_public_name_is_documented(site):
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


@pytest.mark.slow
def test_no_page_needs_the_network(site, pages):
    assert {
        (path, target)
        for path, page in pages.items()
        for target in page.loaded
        if urlsplit(target).netloc
    } == set()
    # what the search of pages opened as files needs: the index as a script, and workers
    assert (site / "search.js").exists()
    assert all("iframe-worker.js" in " ".join(page.loaded) for page in pages.values())


def dead_targets(site: Path, pages: dict[str, Page]) -> list[str]:
    """What leads nowhere, of links and loaded files: a missing file, or an anchor of no element."""
    dead = []
    for path, page in pages.items():
        for target in sorted(page.links | page.loaded):
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            # an absolute path is dead in pages that are opened as files
            found = posixpath.normpath(posixpath.join(posixpath.dirname(path), unquote(url.path)))
            found = found if url.path else path
            fragment = unquote(url.fragment)
            missing = fragment and found in pages and fragment not in pages[found].anchors
            if missing or url.path.startswith("/") or not (site / found).is_file():
                dead.append(f"{path}: {target}")
    return dead


@pytest.mark.slow
def test_no_link_is_dead(site, pages):
    # zensical says nothing of links to other files than pages, nor of pages that nav lacks
    assert dead_targets(site, pages) == []
    navigation = {posixpath.normpath(urlsplit(link).path) for link in pages["index.html"].links}
    assert set(pages) - navigation == set(), "nav of zensical.toml lacks them"


def test_dead_links_are_found(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b.html").write_text(
        '<h1 id="x">X</h1><a href="#x"></a><a href="#y"></a><a href="../c.txt"></a>'
        '<a href="c.txt"></a><a href="b.html#x"></a><a href="b.html#y"></a><img src="../d.png">'
        '<a href="/a/b.html"></a><a href="https://example.org/#y"></a>'
    )
    (tmp_path / "c.txt").touch()
    assert dead_targets(tmp_path, {"a/b.html": Page(tmp_path / "a/b.html")}) == [
        f"a/b.html: {target}" for target in ("#y", "../d.png", "/a/b.html", "b.html#y", "c.txt")
    ]
