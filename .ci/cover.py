"""Show that the suite, under Wine, reaches all of vmshim.py: `python3 .ci/cover.py`.

Each line and branch that it doesn't reach must have its reason below, or the exit status is 1.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import under_wine

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
COVERAGE = "coverage==7.17.3"

OTHER_PLATFORM = "for other platforms than Windows; the suite on Linux reaches it"
KILLED = "the tests reach it in a process that they kill, and coverage is lost with it"
STARTUP = """
import _thread, sys, threading
import coverage

def start_traced(function, arguments):
    def run(*arguments):
        sys.settrace(threading._trace_hook)
        function(*arguments)
    return start(run, arguments)

coverage.process_startup()
# coverage traces the threads of threading; vmshim's are others.
start, _thread.start_new_thread = _thread.start_new_thread, start_traced
"""
SUITE = """
import unittest, test_vmshim
del test_vmshim.InterruptionTest  # it traces, as coverage does
unittest.main(test_vmshim)
"""
TYPES = "type checkers read it"
INTERRUPTED = (
    "only Ctrl-C at the right moment leads there: InterruptionTest and the simulation do it"
)
SIMULATED = "Windows does not fail at the right moment here; on the simulated one it does"

# By the function (or "" outside of any), why the suite can't reach some of it under Wine.
REASONS: dict[str, str] = {
    "": f"{OTHER_PLATFORM}, or {TYPES}",
    "_check_windows": OTHER_PLATFORM,
    "_last_error": OTHER_PLATFORM,
    "_finaliser": OTHER_PLATFORM,
    "_log": "the suite itself has imported logging",
    "_kill": "no process refuses to be killed, or lives on for a while, here",
    "Pipe._run": INTERRUPTED,
    "VMShimServer.serve_forever": INTERRUPTED,
    "VMShimServer._is_serving_here": INTERRUPTED,
    "VMShimServer._end": INTERRUPTED,
    "VMShimServer.shutdown": "it comes when Python ends, and coverage has ended before",
    "_Client.advance": SIMULATED,
    "_run_serve": KILLED,
    "_run_serve.print_request": KILLED,
    "_parse": "for Python 3.14, which is newer than any that runs here",
}


def main(coverage: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        # Each Python that starts from here on, the tests' children too, counts from its first line.
        with open(os.path.join(folder, "sitecustomize.py"), "w") as file:
            file.write(STARTUP)
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
        suite = subprocess.run([*python, "-c", SUITE], cwd=ROOT)
        del os.environ["COVERAGE_PROCESS_START"]
        subprocess.run([*python, "-m", "coverage", "combine", "-q"], cwd=ROOT, check=True)
        subprocess.run(
            [*python, "-m", "coverage", "json", "-q", "-o", report], cwd=ROOT, check=True
        )
        with open(report) as file:
            [found] = json.load(file)["files"].values()
    return tell(found) or suite.returncode


def functions(source: str) -> dict[int, str]:
    """Return the name of the function that each line belongs to."""
    names: dict[int, str] = {}

    def visit(node: ast.AST, outer: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = outer
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{outer}.{child.name}".lstrip(".")
            if isinstance(child, ast.FunctionDef):
                for line in range(child.lineno, (child.end_lineno or child.lineno) + 1):
                    names[line] = name
            visit(child, name)

    visit(ast.parse(source), "")
    return names


def tell(found: dict[str, Any]) -> int:
    """Print what wasn't reached and why; return 1 if there is no reason for some of it."""
    with open(os.path.join(ROOT, "vmshim.py"), encoding="utf-8") as file:
        source = file.read()
    lines, names = source.splitlines(), functions(source)
    unexplained = 0
    branches = [start for start, _ in found["missing_branches"]]
    for number in sorted({*found["missing_lines"], *branches}):
        name = names.get(number, "")
        reason = REASONS.get(name, "")
        unexplained += not reason
        what = "line" if number in found["missing_lines"] else "branch"
        print(f"{number:5} {what:6} {name}: {lines[number - 1].strip()}")
        print(f"{'':12} {reason or 'NO REASON'}")
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
