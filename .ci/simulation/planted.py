"""Plants each mistake of mistakes.py in turn, and tells after how many runs it is found."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

from simulation.mistakes import MISTAKES, Mistake

SCRIPT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "simulate.py")
MAX_RUNS = 20_000


def try_mistake(mistake: Mistake, source: str) -> str:
    """Return what the simulation says of a vmshim.py with this mistake; "" if nothing."""
    if source.count(mistake.old) != 1:
        return f"NOT THERE: the text to replace is there {source.count(mistake.old)} times"
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "vmshim.py")
        with open(path, "w", encoding="utf-8") as file:
            file.write(source.replace(mistake.old, mistake.new))
        command = [sys.executable, SCRIPT, "--file", path, "--seed", "0", "--failures", "1"]
        command += ["--quiet", "--runs", str(MAX_RUNS), *(["--deep"] if mistake.is_deep else [])]
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    found = re.search(r"^seed \d+: (.*)$", run.stdout, re.MULTILINE)
    runs = re.search(r"^(\d+) runs", run.stdout, re.MULTILINE)
    if found and runs:
        return f"{runs[1]:>6} runs: {found[1]}"
    return "" if runs else f"BROKE OFF: {run.stdout[-300:]}"


def plant_all(path: str, only: str, processes: int) -> int:
    """Try all; print a line for each."""
    with open(path, encoding="utf-8") as file:
        source = file.read()
    mistakes = [mistake for mistake in MISTAKES if re.search(only, mistake.rule)]
    missed = 0
    with ThreadPoolExecutor(processes) as pool:
        results = pool.map(lambda mistake: try_mistake(mistake, source), mistakes)
        for mistake, result in zip(mistakes, results):
            missed += not result or result[0] in "NB"
            print(f"{mistake.rule}: {result or f'NOT FOUND in {MAX_RUNS} runs'}", flush=True)
    print(f"{len(mistakes) - missed} of {len(mistakes)} mistakes found")
    return 1 if missed else 0
