"""The entry point of the command `hamblocks` and of `python -m hamblocks`.

It imports nothing of the extra `cli` itself, so that without it the command can name it.
"""

from __future__ import annotations

import sys

from hamblocks.extras import require


def main() -> None:
    """Runs the command line; without the extra `cli` it prints what to install and exits with 2."""
    try:
        require("cli", "the command hamblocks", "typer", "rich", "matplotlib")
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    from hamblocks.cli import app

    app()


if __name__ == "__main__":
    main()
