"""Imports: no torch before it is used, a missing extra is named, and no cycle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp
import pytest

import hamblocks
from hamblocks.__main__ import main
from hamblocks.pytest_plugin import PROFILES
from hamblocks.testing.settings import PROFILES as KNOWN_PROFILES


def run(code: str, *, missing: tuple[str, ...] = (), path: Path) -> subprocess.CompletedProcess:
    """Runs Python in a process of its own, in which some modules cannot be imported."""
    for name in missing:
        (path / f"{name}.py").write_text(f'raise ModuleNotFoundError("No module named {name!r}")\n')
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_hamblocks_imports_no_torch_until_a_name_is_used(tmp_path):
    code = (
        "import hamblocks\n"
        "assert not {'torch', 'hypothesis', 'transformers'} & sys.modules.keys()\n"
        "assert hamblocks.TopK(3).k == 3\n"
        "assert 'torch' in sys.modules\n"
        "assert hamblocks.layer.HAMLayer is hamblocks.HAMLayer\n"
        "assert hamblocks.ops.NEVER > 0\n"
    )
    done = run(code, path=tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    for name in hamblocks.__all__:
        assert getattr(hamblocks, name) is vars(hamblocks)[name]
    assert set(hamblocks.__all__) <= set(dir(hamblocks))
    assert "protocols" in dir(hamblocks)
    with pytest.raises(AttributeError, match="'hamblocks' has no attribute 'Nothing'"):
        hamblocks.Nothing  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "code", "message"),
    [
        ("hypothesis", "import hamblocks.testing", "hamblocks[test]"),
        ("pytest", "from hamblocks.testing import check_gate", "hamblocks[test]"),
        ("transformers", "from hamblocks.models import HAMConfig", "hamblocks[hf]"),
        ("transformers", "import hamblocks.models as m; m.HAMForCausalLM", "hamblocks[hf]"),
    ],
)
def test_an_import_without_its_extra_names_it(tmp_path, missing, code, message):
    done = run(code, missing=(missing,), path=tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert f"needs {missing}: pip install '{message}'" in last


@pytest.mark.slow
def test_models_without_transformers_work_without_it(tmp_path):
    code = "from hamblocks.models import Decoder, Stack"
    assert run(code, missing=("transformers",), path=tmp_path).returncode == 0


@pytest.mark.parametrize("missing", ["typer", "rich", "matplotlib"])
def test_the_command_names_its_extra_in_one_line(tmp_path, missing):
    code = "sys.argv = ['hamblocks', 'info']\nfrom hamblocks.__main__ import main\nmain()"
    done = run(code, missing=(missing,), path=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert f"the command hamblocks needs {missing}: pip install 'hamblocks[cli]'" in line


@pytest.mark.parametrize(
    ("arguments", "missing", "extra"),
    [
        (["check", "gate", "m:G"], "hypothesis", "test"),
        (["convert", "a", "b", "--selector", "Window(4)"], "transformers", "hf"),
    ],
)
def test_the_command_without_the_extra_of_a_part_of_it_names_it(
    tmp_path, arguments, missing, extra
):
    code = f"sys.argv = {['hamblocks', *arguments]}\nfrom hamblocks.__main__ import main\nmain()"
    done = run(code, missing=(missing,), path=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert f"needs {missing}: pip install 'hamblocks[{extra}]'" in line


def test_a_folder_that_cannot_be_made_is_told_in_one_line_and_before_the_work(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "out")
    monkeypatch.setattr(sys, "argv", ["hamblocks", "demo", "--quick", "--out", out])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err == f"[Errno 20] Not a directory: '{out}'\n"


def test_the_plugin_knows_the_profiles():
    assert tuple(KNOWN_PROFILES) == PROFILES


def test_no_module_imports_itself_through_others():
    """At run time, imports inside of functions included; those for type checkers run nothing."""
    graph = grimp.build_graph("hamblocks", "hamblocks_ops", exclude_type_checking_imports=True)
    cycles = [
        (module, chain)
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
        if (chain := graph.find_shortest_chain(imported, module))
    ]
    assert cycles == []
