"""Show that the suite, under Wine, reaches all of vmshim.py: `python3 .ci/cover.py`.

Each line and branch that it doesn't reach must have its reason below, or the exit status is 1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import under_wine

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COVERAGE = "coverage==7.17.3"

OTHER_PLATFORM = "this is for other platforms than Windows; the suite on Linux reaches it"
KILLED = "the tests reach it in a process that they kill, and coverage is lost with it"

# By the text of a line, why the suite can't reach it, or all that may follow it, under Wine.
REASONS = {
    'if sys.platform == "win32":': OTHER_PLATFORM,
    "class _NeedsWindows:": OTHER_PLATFORM,
    "def __getattr__(self, function: str) -> Any:": OTHER_PLATFORM,
    'if function.startswith("__"):  # somebody looks what this is': OTHER_PLATFORM,
    "raise AttributeError(function)": OTHER_PLATFORM,
    'raise OSError(errno.ENOSYS, f"a runhcs pipe needs Windows, and this is {sys.platform}")': OTHER_PLATFORM,
    "_kernel32 = _NeedsWindows()": OTHER_PLATFORM,
    'raise OSError(errno.ENOSYS, f"runhcs\'s state needs Windows, and this is {sys.platform}")': OTHER_PLATFORM,
    "raise RuntimeError(options.fail)": KILLED,
    "if options.fail is not None:": KILLED,
    "os.write(1, SHIM_SUCCESS)": KILLED,
    "os.close(1)": KILLED,
    "sys.stdout = sys.stderr": KILLED,
    "return started": KILLED,
    "return 0": "nothing but Ctrl-C or an error ends serve",
    "if event.error:": "Windows has an event for everyone",
    "raise _pipe_error(event.error, self.name) from None": "Windows has an event for everyone",
    "except Exception:": "it would be a bug of ours",
    '_log("error", "%s: a client failed", self.pipe_path, exc_info=True)': "it would be a bug of ours",
}


def main(coverage: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        # Each Python that starts from here on, the tests' children too, counts from its first line.
        with open(os.path.join(folder, "sitecustomize.py"), "w") as file:
            file.write("import coverage\n\ncoverage.process_startup()\n")
        config = os.path.join(folder, "coveragerc")
        with open(config, "w") as file:
            file.write("[run]\nbranch = True\nparallel = True\ninclude = */vmshim.py\n")
        report = os.path.join(folder, "report.json")
        os.environ.update(
            PYTHONPATH=os.pathsep.join([folder, coverage]),
            COVERAGE_PROCESS_START=config,
            COVERAGE_RCFILE=config,
            COVERAGE_FILE=os.path.join(folder, "data"),
        )
        python = [sys.executable]
        suite = subprocess.run([*python, "test_vmshim.py"], cwd=ROOT)
        del os.environ["COVERAGE_PROCESS_START"]
        subprocess.run([*python, "-m", "coverage", "combine", "-q"], cwd=ROOT, check=True)
        subprocess.run(
            [*python, "-m", "coverage", "json", "-q", "-o", report], cwd=ROOT, check=True
        )
        with open(report) as file:
            [found] = json.load(file)["files"].values()
    return tell(found) or suite.returncode


def tell(found: dict[str, Any]) -> int:
    """Print what wasn't reached and why; return 1 if there is no reason for some of it."""
    with open(os.path.join(ROOT, "vmshim.py"), encoding="utf-8") as file:
        lines = [line.strip() for line in file]
    unexplained = 0
    branches = [start for start, _ in found["missing_branches"]]
    for number in sorted({*found["missing_lines"], *branches}):
        reason = REASONS.get(lines[number - 1], "")
        unexplained += not reason
        what = "line" if number in found["missing_lines"] else "branch"
        print(f"{number:5} {what:6} {lines[number - 1]}\n{'':12} {reason or 'NO REASON'}")
    totals = found["summary"]
    print(
        f"{totals['covered_lines']} of {totals['num_statements']} lines and "
        f"{totals['covered_branches']} of {totals['num_branches']} branches, "
        f"{unexplained} without a reason"
    )
    return 1 if unexplained else 0


if __name__ == "__main__":
    if sys.platform != "win32":
        under_wine.go_on(__file__, under_wine.unpack_wheel(COVERAGE))
    sys.exit(main(sys.argv[1]))
