"""Run the unchanged vmshim.py on a simulated Windows: every order, every fault, in virtual time.

    python3 .ci/simulate.py --seconds 60      as many runs as that, from a random seed on
    python3 .ci/simulate.py --seed 42         one run again, with its history
    python3 .ci/simulate.py --histories       the model against what Windows is known to do
    python3 .ci/simulate.py --suite           the pipe tests of test_vmshim.py
    --deep    switches and Ctrl-C at each bytecode of vmshim.py, some 20 times slower

It runs on Linux and macOS, without Wine. The package `simulation` beside this file has the parts:
the kernel's model, the scheduler, what vmshim sees of them, the rules and the scenarios. It needs
greenlet, which is installed where .ci/run has its tools.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def _find_tools() -> None:
    """Make greenlet importable; install what requirements.txt names if that isn't done yet."""
    if importlib.util.find_spec("greenlet"):
        return
    requirements = os.path.join(HERE, "requirements.txt")
    with open(requirements, "rb") as file:
        named = f"Python {platform.python_version()}\n".encode() + file.read()
    checksum = subprocess.run(["cksum"], input=named, stdout=subprocess.PIPE, check=True).stdout
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    cache = os.environ.get("VMSHIM_CACHE") or os.path.join(cache, "vmshim")
    tools = os.path.join(cache, f"tools-{checksum.split()[0].decode()}")
    if not os.path.isdir(tools):
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        command = [*pip, "--no-deps", "--target", tools + ".part", "-r", requirements]
        subprocess.run(command, check=True, stdout=sys.stderr)
        os.rename(tools + ".part", tools)
    sys.path.insert(0, tools)


if __name__ == "__main__":
    _find_tools()
    from simulation.command import main

    sys.exit(main())
