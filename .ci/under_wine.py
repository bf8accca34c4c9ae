"""How a script of ours goes on under Wine, on a Windows Python of the version that runs it here."""

from __future__ import annotations

import os
import platform
import subprocess
from typing import NoReturn

WINE_PYTHON = os.path.join(os.path.dirname(os.path.abspath(__file__)), "wine-python")
VERSION = ".".join(platform.python_version_tuple()[:2])


def go_on(script: str, *arguments: str) -> NoReturn:
    """Start a script over, on Windows' Python."""
    # A relative path is the same on every drive.
    script = os.path.relpath(script)
    os.execv(WINE_PYTHON, [WINE_PYTHON, "--python", VERSION, script, *arguments])


def unpack_wheel(requirement: str) -> str:
    """Unpack a Windows wheel into wine-python's cache, unless it is there; return its folder."""
    command = [WINE_PYTHON, "--python", VERSION, "--wheel", requirement]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.rstrip()
