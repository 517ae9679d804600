"""Runs the code of a notebook in this process, and compares what it prints with what is committed."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import nbformat

FOLDER = Path(__file__).parents[1] / "docs/notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MEASURED = "measured"
"""Tag of a cell whose numbers hang on rounding; what must hold of them, the cell itself asserts."""


def rerun(path: Path) -> None:
    """Runs the cells of a notebook in order.

    Raises:
        AssertionError: a cell prints something else than is committed. In cells tagged `measured`,
            any number may stand for another.
    """
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    names: dict[str, object] = {}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        source = "\n".join("" if line[:1] == "%" else line for line in cell.source.split("\n"))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, f"{path.name}, cell {number}", "exec"), names)
        committed = "".join(one.text for one in cell.outputs if one.output_type == "stream")
        found = printed.getvalue()
        if MEASURED in cell.metadata.get("tags", []):
            found, committed = (re.sub(r"\d+(\.\d+)?", "#", text) for text in (found, committed))
        assert found == committed, f"{path.name}, cell {number}: make notebooks"
