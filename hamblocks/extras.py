"""Optional dependencies: a clear error where one is missing, which names the extra to install."""

from __future__ import annotations

from importlib import import_module


def require(extra: str, what: str, *modules: str) -> None:
    """Imports the modules that an extra of hamblocks installs.

    Args:
        extra: name of the extra, as in `pip install 'hamblocks[extra]'`.
        what: what needs the modules, for the message.
        modules: names of the modules.

    Raises:
        ImportError: a module cannot be imported; the message names the extra.
    """
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            raise ImportError(
                f"{what} needs {module}: pip install 'hamblocks[{extra}]' ({error})", name=module
            ) from error
