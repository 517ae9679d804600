"""Every example runs, and fits on a page."""

import inspect
import runpy
import sys
from pathlib import Path

import pytest

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
    assert PRINTED.get(path.stem, "checks passed") in capsys.readouterr().out
    assert len(path.read_text().splitlines()) < 60


def test_the_readme_of_the_examples_names_all_of_them():
    listed = (ROOT / "README.md").read_text()
    assert EXAMPLES
    for path in EXAMPLES:
        assert f"`{path.name}`" in listed
