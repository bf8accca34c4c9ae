"""The command line of .ci/simulate.py: many runs, or one run again."""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import time
from typing import Any, NamedTuple

from simulation.deep import Tracer
from simulation.environment import Slot
from simulation.fibers import GreenletExit
from simulation.on_model import compare_model
from simulation.rules import Run, decisions_for
from simulation.scenarios import scenario_for
from simulation.scheduler import Decisions

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SLOTS = 8
FIXED_SEEDS = range(200)  # always run first
REPEAT_EVERY = 500  # one run in so many is run twice: both must be the same


class Outcome(NamedTuple):
    """What came of a run."""

    violations: list[str]
    steps: int
    decisions: Decisions
    history: list[Any]


class Simulator:
    """Holds what all runs share: the copies of vmshim.py."""

    def __init__(self, source: str, *, deep: bool) -> None:
        code = compile(source, "vmshim.py", "exec")
        self.slots = [Slot(code) for _ in range(SLOTS)]
        self.deep = deep
        # From 3.12 on the bytecodes of a function are traced only after it has been called once.
        self.repeats_exactly = not deep or sys.version_info < (3, 12)
        self.tracer = Tracer()
        self.lost: list[str] = []
        sys.unraisablehook = self._unraisable
        # A collection at any other time would call finalisers in an order of its own.
        gc.collect()
        gc.freeze()
        gc.disable()

    def _unraisable(self, lost: Any) -> None:
        if lost.exc_type is not GreenletExit:
            self.lost.append(f"exception: {lost.exc_value!r} is lost in {lost.object!r}")

    def run(self, seed: int, *, keep_history: bool = False) -> Outcome:
        """Run once."""
        decisions = decisions_for(seed)
        self.lost.clear()
        run = Run(self.slots, seed, decisions, keep_history=keep_history)
        run.deep = self.deep
        if self.deep:
            self.tracer.start(run)
        try:
            violations = run.run(scenario_for(seed))
        finally:
            if self.deep:
                self.tracer.stop()
        violations = violations + self.lost
        outcome = Outcome(violations, run.scheduler.steps, decisions, run.scheduler.history)
        run.end()
        del run
        gc.collect()
        return outcome


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, help="how long to go on")
    parser.add_argument("--runs", type=int, help="how many runs")
    parser.add_argument("--seed", type=int, help="repeat this run, or begin with it")
    parser.add_argument("--deep", action="store_true", help="switch at each bytecode of vmshim.py")
    parser.add_argument("--histories", action="store_true", help="check the model")
    parser.add_argument("--mistakes", metavar="REGEX", nargs="?", const="", help="plant mistakes")
    parser.add_argument("--processes", type=int, default=1, help="of --mistakes, at a time")
    parser.add_argument("--suite", action="store_true", help="run test_vmshim.py's pipe tests")
    parser.add_argument("--file", default=os.path.join(ROOT, "vmshim.py"), help="another vmshim.py")
    parser.add_argument("--quiet", action="store_true", help="no histories of runs that fail")
    parser.add_argument("--only", default="", help="the tests of --suite with this in their names")
    parser.add_argument("--failures", type=int, default=10, help="stop after so many")
    options = parser.parse_args()
    if options.histories:
        return _check_histories()
    if options.mistakes is not None:
        from simulation.planted import plant_all

        return int(plant_all(options.file, options.mistakes, options.processes))
    if options.suite:
        from simulation.suite import run_suite

        return run_suite(options.file, options.only)
    with open(options.file, encoding="utf-8") as file:
        simulator = Simulator(file.read(), deep=options.deep)
    if options.seed is not None and options.seconds is None and options.runs is None:
        return _run_one(simulator, options.seed)
    return _run_many(simulator, options)


def _check_histories() -> int:
    from simulation.histories import HISTORIES

    wrong = compare_model()
    for line in wrong:
        print(line)
    print(f"{len(HISTORIES)} histories on the model, {len(wrong)} differ")
    return 1 if wrong else 0


def _run_many(simulator: Simulator, options: argparse.Namespace) -> int:
    first = random.SystemRandom().randrange(10**9) if options.seed is None else options.seed
    seeds = [*FIXED_SEEDS] if options.seed is None else []
    print(f"from seed {first} on", flush=True)
    began = time.monotonic()
    runs = failed = 0
    while True:
        if options.runs is not None and runs >= options.runs:
            break
        if options.seconds is not None and time.monotonic() - began >= options.seconds:
            break
        if options.runs is None and options.seconds is None and runs >= 1000:
            break
        seed = seeds.pop(0) if seeds else first + runs
        outcome = simulator.run(seed)
        violations = outcome.violations
        if not violations and runs % REPEAT_EVERY == 0 and simulator.repeats_exactly:
            violations = _compare_repeated(simulator, seed, outcome)
        runs += 1
        if violations:
            failed += 1
            print(f"seed {seed}: {violations[0]}", flush=True)
            if not options.quiet and failed == 1:
                _show(simulator, seed)
            if failed >= options.failures:
                break
    rate = runs / (time.monotonic() - began)
    print(f"{runs} runs, {rate:.0f} runs/s, seed {first}, {failed} violations")
    return 1 if failed else 0


def _compare_repeated(simulator: Simulator, seed: int, first: Outcome) -> list[str]:
    """Run again: all must be the same."""
    second = simulator.run(seed)
    before, after = first.decisions, second.decisions
    if (first.steps, before.switches, before.faults) == (
        second.steps,
        after.switches,
        after.faults,
    ):
        return []
    return ["replay: the same seed gave another run"]


def _run_one(simulator: Simulator, seed: int) -> int:
    failed = 1 if _show(simulator, seed) else 0
    print(f"1 run, 1 runs/s, seed {seed}, {failed} violations")
    return failed


def _show(simulator: Simulator, seed: int) -> list[str]:
    """Print a run's history: when, who, what; each thread has a column of its own."""
    outcome = simulator.run(seed, keep_history=True)
    columns: dict[str, int] = {}
    for _, who, _ in outcome.history:
        columns.setdefault(who, len(columns))
    print(f"seed {seed}, scenario {scenario_for(seed).__name__}; the threads, from left to right:")
    print("  " + ", ".join(columns))
    for when, who, what in outcome.history:
        print(f"{when * 1000:12.3f} ms {'   ' * columns[who]}{who}: {what}")
    for line in outcome.violations:
        print(f"broken: {line}")
    return outcome.violations
