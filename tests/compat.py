"""`make compat`: a short suite under several versions of Python, torch and transformers, one table.

Every combination gets a virtual environment under build/compat/. torch is installed without NVIDIA's
libraries, several gigabytes that a CPU never calls: where a build of torch for CUDA looks for them,
small libraries of the same names stand in their place (`Placeholders`). The results go to
docs/assets/environment.json, and docs/environment.md is written from that file.

    python tests/compat.py                            all combinations, then the page
    python tests/compat.py 3.10/2.6.0/5.6.0           these only; the others keep their results
    python tests/compat.py --page                     the page from the results that are there
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "compat"
RESULTS = ROOT / "docs" / "assets" / "environment.json"
PAGE = ROOT / "docs" / "environment.md"

COMBINATIONS = [
    "3.10/2.6.0/5.6.0",
    "3.10/2.6.0/newest",
    "3.11/2.13.0/5.6.0",
    "3.11/2.13.0/5.12.0",
    "3.11/2.13.0/newest",
    "3.11/2.14.1/5.23.0",
    "3.12/2.9.1/5.6.0",
    "3.13/2.13.0/5.23.0",
    "3.14/2.13.0/newest",
]
"""Python, torch and transformers: the oldest, the newest, and some between."""

BESIDE = [
    *("numpy", "filelock", "typing-extensions", "networkx", "jinja2", "fsspec", "sympy"),
    *("pytest", "hypothesis", "psutil", "pyyaml", "packaging", "safetensors"),
]
"""What torch, accelerate and the suite need. Named here, because pip installs neither of the two
with its requirements, which are NVIDIA's libraries too."""

SUITE = [
    "tests/border",
    "tests/ops/test_select.py",
    "tests/parts/test_decoder.py",
    "tests/parts/test_prefix.py",
    "tests/hf/test_convert.py",
    "tests/hf/test_convert_memories.py",
    "tests/hf/test_generation.py",
    "tests/test_saved_files.py",
]
"""Tests of what depends on versions: other libraries' hands, the cache, generate, saved files."""


class Combination(NamedTuple):
    """Versions of Python, torch and transformers."""

    python: str
    torch: str
    transformers: str

    @property
    def folder(self) -> Path:
        """Its virtual environment."""
        return BUILD / "-".join(self)

    @property
    def run(self) -> Path:
        """The interpreter of its virtual environment."""
        return self.folder / "bin" / "python"


class NotInstalled(Exception):  # noqa: N818 - a result of the table, no error
    """A combination cannot be installed here; the message says why."""


def interpreter(version: str) -> str:
    """The path of an interpreter: the one that runs this, one on PATH, or one of pyenv."""
    if sys.version.startswith(f"{version}."):
        return sys.executable
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for found in (*pyenv[-1:], shutil.which(f"python{version}")):
        if found is not None and _output([str(found), "-c", "import venv"]) is not None:
            return str(found)
    raise NotInstalled(f"no Python {version} on this machine")


def install(combination: Combination) -> None:
    """Makes the virtual environment of a combination, unless it is there already."""
    ready = combination.folder / "ready"
    if ready.exists():
        return
    shutil.rmtree(combination.folder, ignore_errors=True)
    _run([interpreter(combination.python), "-m", "venv", str(combination.folder)])
    version = combination.transformers
    transformers = "transformers" if version == "newest" else f"transformers=={version}"
    _pip(combination, "--no-deps", f"torch=={combination.torch}")
    _pip(combination, *BESIDE, transformers)
    _pip(combination, "--no-deps", "accelerate")
    if _output([str(combination.run), "-c", "import torch"]) is None:
        Placeholders(combination).write()
    if _output([str(combination.run), "-c", "import torch"]) is None:
        raise NotInstalled("torch cannot be imported")
    ready.touch()


def _pip(combination: Combination, *what: str) -> None:
    options = ["--quiet", "--disable-pip-version-check", "--no-input"]
    try:
        _run([str(combination.run), "-m", "pip", "install", *options, *what])
    except subprocess.CalledProcessError as error:
        raise NotInstalled((error.stderr or "").strip().splitlines()[-1]) from error


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _output(command: list[str]) -> str | None:
    """What a command prints; None if it fails."""
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    return ended.stdout if ended.returncode == 0 else None


class Placeholders:
    """Libraries with the names and symbols of CUDA's, none of which is ever called on a CPU.

    The loader resolves the symbols of torch's CUDA libraries when torch is imported. Every function
    here returns 100, which is CUDA's "no device".
    """

    def __init__(self, combination: Combination) -> None:
        self.lib = next(combination.folder.glob("lib*/python*/site-packages/torch/lib"))
        self.files = [path for path in self.lib.iterdir() if ".so" in path.name]
        self.versioned: dict[str, set[str]] = collections.defaultdict(set)
        self.plain: set[str] = set()
        for symbol in self._undefined():
            name, _, version = symbol.partition("@")
            if re.match("lib|NV", version):
                self.versioned[version].add(name)
            elif not version and re.match("cu|nccl|nv|__cuda", name):
                self.plain.add(name)

    def _undefined(self) -> Iterator[str]:
        for path in self.files:
            for line in (_output(["readelf", "-W", "--dyn-syms", str(path)]) or "").splitlines():
                fields = line.split()
                if len(fields) > 7 and fields[6] == "UND":
                    yield fields[7]

    def write(self) -> None:
        """Compiles a library for every one that torch needs and does not bring."""
        there = {path.name for path in self.files}
        needed: set[str] = set()
        for path in self.files:
            listed = _output(["readelf", "-d", str(path)]) or ""
            needed |= set(re.findall(r"NEEDED.*\[(lib(?:cu|nccl|nv).*?)\]", listed))
        for library in sorted(needed - there):
            stem = library.partition(".so")[0]
            own = [name for name in self.versioned if _stem(name) in (stem, stem.partition("_")[0])]
            self._compile(library, own[0] if own else None)

    def _compile(self, library: str, version: str | None) -> None:
        own = self.versioned[version] if version else self.plain
        source, script = self.lib / "placeholder.c", self.lib / "placeholder.map"
        source.write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in sorted(own)))
        more = []
        if version:
            script.write_text(f"{version} {{ global: {' '.join(f'{name};' for name in own)} }};\n")
            more = [f"-Wl,--version-script={script}"]
        soname = f"-Wl,-soname,{library}"
        target = ["-o", str(self.lib / library), str(source)]
        _run(["gcc", "-w", "-shared", "-fPIC", soname, *more, *target])


def _stem(version: str) -> str:
    """The name of the library that a version of symbols is of: libcufft.so.11, NVSHMEM."""
    stem = version.partition(".so")[0]
    return stem if stem.startswith("lib") else f"lib{stem.lower()}"


def tried(combination: Combination) -> dict[str, Any]:
    """Installs a combination and runs the suite: the versions, counts and names of what failed."""
    try:
        install(combination)
    except NotInstalled as reason:
        return {"not_tried": str(reason)}
    report = combination.folder / "report.xml"
    report.unlink(missing_ok=True)
    paths = [str(ROOT), str(ROOT / "ops"), str(ROOT / "tests")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    # warnings of other versions are not errors here, and the plugins of `make test` are not there
    options = ["-q", "-p", "no:cacheprovider", "-p", "hamblocks.pytest_plugin"]
    options += ["-o", "addopts=--strict-markers", "-o", "filterwarnings=default"]
    options += ["--hamblocks-profile", "dev", "-m", "not slow", f"--junitxml={report}"]
    began = time.monotonic()
    ended = subprocess.run(
        [str(combination.run), "-m", "pytest", *options, *SUITE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    (combination.folder / "output.txt").write_text(ended.stdout + ended.stderr)
    if not report.exists():
        return {"not_tried": f"pytest stopped (see {combination.folder.name}/output.txt)"}
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    kinds = {"failed": ("failure", "error"), "skipped": ("skipped",)}
    names = {
        kind: sorted(
            _name(case) for case in cases if any(case.find(tag) is not None for tag in tags)
        )
        for kind, tags in kinds.items()
    }
    versions = (
        "import json, platform, torch, transformers; print(json.dumps([platform.python_version(), "
        "torch.__version__, transformers.__version__]))"
    )
    found = json.loads(_output([str(combination.run), "-c", versions]) or "[]")
    return {
        "versions": found,
        "passed": len(cases) - len(names["failed"]) - len(names["skipped"]),
        "skipped": len(names["skipped"]),
        "failed": names["failed"],
        "seconds": round(time.monotonic() - began),
    }


def _name(case: ElementTree.Element) -> str:
    file = case.get("classname", "").replace("tests.", "", 1).replace(".", "/")
    return f"{file}.py::{case.get('name')}"


def page(results: dict[str, dict[str, Any]]) -> str:
    """The page of the docs."""
    lines = [
        "# Environment",
        "",
        "hamblocks needs Python 3.10 and torch 2.6, and its models transformers 5.6. `make compat` runs a",
        "short suite under several versions and writes this page. It is not part of `make test`. The",
        "suite covers what depends on versions: a layer in other libraries' hands, the cache, `generate`,",
        "saved files.",
        "",
        "| Python | torch | trans&shy;formers | passed | failed | skipped | time (s) |",
        "|---|---|---|--:|--:|--:|--:|",
    ]
    notes: list[str] = []
    for name in sorted({*COMBINATIONS, *results}, key=_order):
        result = results.get(name, {"not_tried": "not run yet"})
        if "not_tried" in result:
            python, torch, transformers = name.split("/")
            lines.append(f"| {python} | {torch} | {transformers} | not tried | | | |")
            notes.append(f"- {name}: not tried, {result['not_tried']}.")
            continue
        counts = [result["passed"], len(result["failed"]), result["skipped"], result["seconds"]]
        lines.append(f"| {' | '.join(map(str, (*result['versions'], *counts)))} |")
        notes += [f"- {name}: `{test}` fails." for test in result["failed"]]
    lines += [
        "",
        "Every run is on a CPU with one thread. Builds of torch for CUDA (+cu) run with stand-ins for",
        "CUDA's libraries. transformers 5.24 asks CUDA whether a stream is captured, and torch crashes on",
        "the stand-ins, so it is paired with the CPU build (+cpu) alone.",
        "",
        *notes,
    ]
    return "\n".join(lines).rstrip() + "\n"


def _order(name: str) -> list[Any]:
    return [[int(x) if x.isdigit() else 999 for x in part.split(".")] for part in name.split("/")]


def main() -> int:
    """Runs the command line; returns 1 if a test failed under any combination that was tried."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("combination", nargs="*", help="python/torch/transformers; default: all")
    parser.add_argument("--page", action="store_true", help="only write the page")
    given = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in [] if given.page else given.combination or COMBINATIONS:
        results[name] = tried(Combination(*name.split("/")))
        print(name, json.dumps(results[name]), flush=True)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    PAGE.write_text(page(results))
    return int(any(result.get("failed") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
