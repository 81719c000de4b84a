"""``python -m spin_cli`` and the ``spin`` command."""

from __future__ import annotations

import atexit
import os
import sys

SIGNALLED = 128
"""Exit codes above this one say that a signal ended spin."""


def main() -> None:
    """Run the command line."""
    from spin_cli.cli import run

    code = run()
    if code > SIGNALLED:
        # Python would wait for threads that are in the middle of a fit, which nobody needs now.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
