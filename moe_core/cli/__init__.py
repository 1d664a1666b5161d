"""The command line, `moe-core`. One file per command; what `run` and `demo` share is in `generation.py`.

Results go to stdout (with --json, nothing but JSON does), progress and notes to stderr. Nothing is ever downloaded.
"""

from __future__ import annotations

import os
import sys

_NEEDED = ("click", "rich")


def main() -> None:
    """The entry point; says which package is missing rather than showing a traceback."""
    try:
        from moe_core.cli.app import app  # noqa: PLC0415 - click and rich are an extra
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _NEEDED:
            raise
        sys.exit(f'moe-core: the command line needs {package}: pip install "moe-core[cli]"')
    os.environ["HF_HUB_OFFLINE"] = "1"  # beside local_files_only: no library below may ask the Hub for anything
    app(prog_name="moe-core")
