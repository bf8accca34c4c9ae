"""Break each rule of vmshim.py, one at a time, and see the suite fail each time.

`python3 .ci/mutate.py` takes about an hour; `--only REGEX` tries some, `--linux` only those that the
suite on Linux notices, and `--quick` runs no more than the test classes of each rule. A rule that
can be broken unnoticed is printed as SURVIVED, and the exit status is 1. It needs procps' pkill.

mutations.txt holds the rules:

    == the test classes that should notice the following; they run first, then the rest of the suite
    a rule
    @ the function, method, class or module-level name (of a call: the function) where it is kept,
      or "module", anywhere
    - the text to replace, which must be there exactly once; lines are whole but for the outer two
    + what to replace it by, in order to break the rule
    ? an excuse: why no test under Wine can show it

Tests that fail without any edit are named at the start and left out.
"""

from __future__ import annotations

import argparse
import ast
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Iterator, NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
FILES = ("test_vmshim.py", "README.md", "setup.cfg")
TIMEOUT = 240  # seconds for a suite, which then hangs

# A test that fails mostly waits for something in vain, so the tests' patience is shortened.
PATIENCE = "LONG = 30.0"
SHORT_PATIENCE = "LONG = 10.0"

RUNNER = '''
"""Run the suite: these test classes first, without these tests, to the first failure or to the end."""

import os
import sys
import unittest

import test_vmshim

first, left_out, failfast, quick = (argument.split() for argument in sys.argv[1:])


def tests_in(suite):
    for part in suite:
        if isinstance(part, unittest.TestSuite):
            yield from tests_in(part)
        else:
            yield part


suite = unittest.defaultTestLoader.loadTestsFromModule(test_vmshim)
tests = [test for test in tests_in(suite) if test.id() not in left_out]
tests.sort(key=lambda test: [*first, type(test).__name__].index(type(test).__name__))
names = {type(test).__name__ for test in tests}
for name in first:
    assert name in names, f"there is no test class {name}"
if quick:
    tests = [test for test in tests if type(test).__name__ in first]
runner = unittest.TextTestRunner(sys.stdout, verbosity=2, failfast=bool(failfast))
result = runner.run(unittest.TestSuite(tests))
sys.stdout.flush()
os._exit(not result.wasSuccessful())  # a thread may hang
'''


class Edit(NamedTuple):
    """A rule, and what to replace by what in order to break it."""

    rule: str
    tests: str
    where: str
    old: str
    new: str
    excuse: str


def read_edits() -> Iterator[Edit]:
    with open(os.path.join(HERE, "mutations.txt"), encoding="utf-8") as file:
        paragraphs = file.read().strip("\n").split("\n\n")
    tests = ""
    for paragraph in paragraphs:
        rule, *lines = paragraph.split("\n")
        if rule.startswith("== "):
            tests = rule[3:]
            continue
        parts = {
            sign: "\n".join(line[2:] for line in lines if line.startswith(f"{sign} "))
            for sign in "@-+?"
        }
        yield Edit(rule, tests, *parts.values())


def definitions(body: list[ast.stmt], outer: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """Yield what a module or class defines, by name; a call at module level by the function's."""
    for node in body:
        if isinstance(node, ast.If):
            yield from definitions(node.body + node.orelse, outer)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield outer + node.name, node
            yield from definitions(node.body, f"{outer}{node.name}.")
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield outer + dotted(target), node
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield outer + dotted(node.value.func), node


@functools.lru_cache(maxsize=1)
def parse(source: str) -> ast.Module:
    return ast.parse(source)


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def apply_edit(source: str, edit: Edit) -> str:
    """Return the source with the edit in it. Raise ValueError if it doesn't fit exactly once."""
    lines = source.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]
    text = re.escape(edit.old)
    if edit.where == "module":
        places = [match.start() for match in re.finditer(text, source)]
    else:
        places = []
    for name, node in definitions(parse(source).body):
        if name == edit.where:
            assert node.end_lineno
            start, end = starts[node.lineno - 1], starts[node.end_lineno]
            places += [start + match.start() for match in re.finditer(text, source[start:end])]
    if len(places) != 1:
        raise ValueError(f"what to replace is {len(places)} times in {edit.where}")
    [place] = places
    return source[:place] + edit.new + source[place + len(edit.old) :]


class Suite(NamedTuple):
    """How the suite is run: by which Python, with which tests, to its end or to the first failure."""

    python: str
    quick: bool = False
    left_out: str = ""
    failfast: bool = False


def run_suite(source: str, first: str, how: Suite) -> tuple[int, str]:
    """Run the suite with this vmshim.py; return its exit status and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        for name in FILES:
            shutil.copy(os.path.join(ROOT, name), folder)
        with open(os.path.join(ROOT, "test_vmshim.py"), encoding="utf-8") as file:
            tests = file.read()
        assert tests.count(PATIENCE) == 1
        for name, text in (
            ("vmshim.py", source),
            ("test_vmshim.py", tests.replace(PATIENCE, SHORT_PATIENCE)),
            ("run_tests.py", RUNNER),
        ):
            with open(os.path.join(folder, name), "w", encoding="utf-8", newline="") as file:
                file.write(text)
        flags = ["failfast" if how.failfast else "", "quick" if how.quick else ""]
        options = [first, how.left_out, *flags]
        # A file and not a pipe, which a process that the suite has left would keep open.
        with open(os.path.join(folder, "output"), "w+b") as log:
            suite = subprocess.run(
                ["timeout", "-s", "KILL", str(TIMEOUT), how.python, "run_tests.py", *options],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            log.seek(0)
            output = log.read().decode(errors="replace")
        # Its processes have the folder in their command lines.
        subprocess.run(["pkill", "-KILL", "-f", os.path.basename(folder)])
    return suite.returncode, output


def failures_in(output: str) -> list[str]:
    """Return the tests that failed, as unittest's id() has them, each once."""
    heads = re.findall(r"^(?:FAIL|ERROR): (\w+) \(([\w.]+)\)", output, re.MULTILINE)
    # Before Python 3.11 the brackets hold the class alone.
    ids = [where if where.endswith(f".{name}") else f"{where}.{name}" for name, where in heads]
    return list(dict.fromkeys(ids))


def try_edit(source: str, edit: Edit, how: Suite) -> tuple[str, str]:
    """Return a verdict, and which test noticed or what went wrong."""
    try:
        broken = apply_edit(source, edit)
        compile(broken, "vmshim.py", "exec")
    except (ValueError, SyntaxError) as error:
        return "NO EDIT ", str(error)
    status, output = run_suite(broken, edit.tests, how)
    if abs(status) in (9, 128 + 9):
        return "noticed ", "hangs at " + output.rstrip().rpartition("\n")[2][:80]
    if status:
        [failure, *_] = failures_in(output) or ["the suite broke off: " + output[-300:]]
        return "noticed ", failure
    return ("excused ", edit.excuse) if edit.excuse else ("SURVIVED", "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="REGEX", help="rules to break")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--linux", action="store_true", help="run the suite here, without pipes")
    parser.add_argument("--quick", action="store_true", help="run the rule's test classes only")
    parser.add_argument("--fit", action="store_true", help="only see whether the edits fit")
    options = parser.parse_args()
    with open(os.path.join(ROOT, "vmshim.py"), encoding="utf-8") as file:
        source = file.read()
    edits = [edit for edit in read_edits() if re.search(options.only, edit.rule)]
    if options.fit:
        status = 0
        for edit in edits:
            try:
                compile(apply_edit(source, edit), "vmshim.py", "exec")
            except (ValueError, SyntaxError) as error:
                print(f"NO EDIT   {edit.rule}: {error}")
                status = 1
        return status

    how = Suite(sys.executable if options.linux else os.path.join(HERE, "wine-python"))
    _, output = run_suite(source, "", how)
    left_out = failures_in(output)
    for name in left_out:
        print(f"fails without any edit, left out: {name}")
    how = how._replace(quick=options.quick, left_out=" ".join(left_out), failfast=True)
    counts: dict[str, int] = {}
    started = time.monotonic()

    def try_one(edit: Edit) -> tuple[str, str]:
        return try_edit(source, edit, how)

    with ThreadPoolExecutor(options.jobs) as pool:
        for edit, (verdict, reason) in zip(edits, pool.map(try_one, edits)):
            print(f"{verdict}  {edit.rule}: {reason}", flush=True)
            counts[verdict.strip()] = counts.get(verdict.strip(), 0) + 1
    figures = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    print(f"{len(edits)} rules: {figures}, in {(time.monotonic() - started) / 60:.0f} minutes")
    return 1 if counts.keys() & {"SURVIVED", "NO EDIT"} else 0


if __name__ == "__main__":
    sys.exit(main())
