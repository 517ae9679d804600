"""Every example and notebook runs, and fits on a page."""

import inspect
import json
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
from matplotlib import pyplot as plt
from notebooks import FOLDER, NOTEBOOKS, rerun

from hamblocks.testing import settings

ROOT = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(ROOT.glob("*.py"))
GIVEN = {"plain_torch": [inspect.__file__, "2"], "trainer": [inspect.__file__, "2"]}
PRINTED = {
    "fork_prompt": "the prompt's among them",
    "llama_layer": "largest difference of logits",
    "plain_torch": "Written: kept.png",
    "trainer": "stored at the end:",
}


@pytest.fixture(autouse=True)
def _as_for_a_user():
    with settings.using(settings.chosen()._replace(profile="dev")):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), *GIVEN.get(path.stem, [])])
    runpy.run_path(str(path), run_name=f"example_{path.stem}")
    printed = capsys.readouterr().out
    assert PRINTED.get(path.stem, "checks passed") in printed
    if path.stem in GIVEN:  # the thresholds of what it trained moved
        assert "100%" not in printed
    assert len(path.read_text().splitlines()) < 60


STABLE = runpy.run_path(str(FOLDER / "run.py"))["stable"]
PRETRAINED = "a_pretrained_model.ipynb"  # run by tests/hf/test_smollm2.py


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [path for path in NOTEBOOKS if path.name != PRETRAINED],
    ids=lambda path: path.stem,
)
def test_notebooks_run_and_print_what_they_show(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    rerun(path)
    plt.close("all")


def test_notebooks_are_short_and_hold_nothing_of_the_machine():
    assert [path.name for path in NOTEBOOKS if path.name == PRETRAINED]
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert sum(len(cell["source"]) for cell in code) < 70
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        shown = [output for cell in code for output in cell["outputs"]]
        assert any("image/png" in output.get("data", {}) for output in shown)
        assert str(Path.home()) not in json.dumps(notebook)
        assert {str(cell["metadata"]) for cell in code} <= {"{}", "{'tags': ['measured']}"}
        cleaned = STABLE(nbformat.read(path, as_version=4))
        assert nbformat.writes(cleaned) + "\n" == path.read_text(encoding="utf-8")


def test_outputs_are_written_without_what_differs_from_run_to_run():
    streams = [
        nbformat.v4.new_output("stream", name=name, text=name) for name in ("stdout", "stderr")
    ]
    picture = nbformat.v4.new_output(
        "display_data", {"image/png": "x"}, metadata={"image/png": {"width": 640}}
    )
    cell = nbformat.v4.new_code_cell("1", outputs=[*streams, picture], execution_count=1)
    cell.metadata = nbformat.from_dict({"execution": {"iopub.execute_input": "12:00"}})
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebook.metadata = nbformat.from_dict({"language_info": {"version": "3.11.7"}})
    cleaned = STABLE(notebook)
    (cell,) = cleaned.cells
    assert [output.get("name") for output in cell.outputs] == ["stdout", None]
    assert cell.outputs[1].metadata == cell.metadata == {}
    assert (cell.id, cell.execution_count) == ("0", 1)
    assert "version" not in cleaned.metadata.language_info


@pytest.mark.parametrize("listing", ["README.md", "docs/index.md", "examples/README.md"])
def test_notebooks_are_linked(listing):
    text = (ROOT.parent / listing).read_text(encoding="utf-8")
    assert [path.name for path in NOTEBOOKS if f"notebooks/{path.name})" not in text] == []


def test_the_readme_of_the_examples_names_all_of_them():
    listed = (ROOT / "README.md").read_text()
    assert EXAMPLES
    for path in EXAMPLES:
        assert f"`{path.name}`" in listed
