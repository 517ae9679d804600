"""The entry point of the command `hamblocks` and of `python -m hamblocks`.

It imports nothing of the extra `cli` itself, so that without it the command can name it.
"""

from __future__ import annotations

import sys

from hamblocks.extras import require


def main() -> None:
    """Runs the command line.

    A package that is missing is an error of one line, which names the extra to install, and the
    exit code 2. A file that cannot be read or written is one of one line and the exit code 1.
    """
    try:
        require("cli", "the command hamblocks", "typer", "rich", "matplotlib")
        from hamblocks.cli import app

        app()
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
