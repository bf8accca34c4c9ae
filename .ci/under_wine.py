"""How a script of ours goes on under Wine, on a Windows Python of the version that runs it here."""

from __future__ import annotations

import glob
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from typing import NoReturn

HERE = os.path.dirname(os.path.abspath(__file__))
VERSION = ".".join(platform.python_version_tuple()[:2])


def go_on(script: str, *arguments: str) -> NoReturn:
    """Start a script over, on Windows' Python."""
    python = os.path.join(HERE, "wine-python")
    os.execv(python, [python, "--python", VERSION, script, *arguments])


def unpack_wheel(requirement: str) -> str:
    """Unpack a Windows wheel into wine-python's cache, unless it is there; return its folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = os.environ.get("VMSHIM_CACHE") or os.path.join(cache, "vmshim")
    folder = os.path.join(cache, f"{requirement}-{VERSION}")
    if not os.path.exists(folder):
        with tempfile.TemporaryDirectory() as download:
            pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", download]
            target = ["--only-binary=:all:", "--platform=win_amd64", "--python-version", VERSION]
            subprocess.run([*pip, *target, requirement], check=True)
            [wheel] = glob.glob(os.path.join(download, "*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
    return "Z:" + folder.replace("/", "\\")
