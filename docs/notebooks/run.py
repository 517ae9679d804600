"""Runs notebooks and writes their outputs in place, without what differs from run to run.

python docs/notebooks/run.py [FILE ...]    (default: every notebook of this folder)
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def stable(notebook: Any) -> Any:
    """The notebook without times, versions and progress bars, its cells numbered from 0."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells):
        cell.id = str(number)
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type != "code":
            continue
        # stderr has progress bars, which show speeds
        cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
        for output in cell.outputs:
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
    return notebook


def run(path: Path) -> None:
    """Runs a notebook in a kernel of its own, and writes it back with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the file stays as it was.
    """
    notebook = nbformat.read(path, as_version=4)
    # the output of a cell is one text, whatever the kernel's timing
    client = NotebookClient(notebook, timeout=300, coalesce_streams=True)
    with tempfile.TemporaryDirectory() as folder:  # what it writes is not kept
        client.execute(cwd=folder)
    nbformat.write(stable(notebook), path)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums in the same order on every machine
    for name in sys.argv[1:] or sorted(map(str, FOLDER.glob("*.ipynb"))):
        run(Path(name))
        print(f"Written: {name}")
