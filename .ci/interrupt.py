"""Press Ctrl-C at every point of vmshim.py, and see that nothing hangs and nothing is left.

`python3 .ci/interrupt.py` takes every point of every scenario of the suite's InterruptionTest, on
the oldest and the newest Windows Python that `.ci/linux-python` finds; it takes 20 minutes.
`--step N` takes every N-th point, `--only REGEX` some scenarios, `--twice` presses it twice, and
`--python 3.X` chooses the Python. The last line tells the outcomes; the exit status is 1 if any was
wrong.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))

ROUNDS_TO_WARM_UP = 6


def main(step: int, only: str, *, twice: bool) -> int:
    import test_vmshim

    points, hangs, wrong_ends, longest = 0, 0, 0, 0.0
    with test_vmshim.Peer() as peer:
        interruptions = test_vmshim.Interruptions(peer)
        for scenario in test_vmshim.SCENARIOS:
            if not re.search(only, scenario.__name__):
                continue
            for _ in range(ROUNDS_TO_WARM_UP):
                interruptions.run(scenario, 0)
            before, ended = points, 0
            for point in itertools.count(random.randrange(1, step + 1), step):
                outcome = interruptions.run(scenario, point, twice=twice)
                # How many points there are changes from run to run.
                ended = ended + 1 if outcome.ended else 0
                if ended == 3:
                    break
                points += not outcome.ended
                longest = max(longest, outcome.seconds)
                # That finaliser of subprocess is Python code, which Ctrl-C can cut short.
                if outcome.wrong and "Handle.Close" not in outcome.wrong:
                    hangs += outcome.wrong == "hangs"
                    wrong_ends += outcome.wrong != "hangs"
                    print(f"{scenario.__name__}, point {point}, {outcome.place}: {outcome.wrong}")
                if outcome.wrong == "hangs":
                    break
            print(f"{scenario.__name__}: {points - before} points", flush=True)
    print(
        f"Python {sys.version.split()[0]}: {points} points, {hangs} hangs, {wrong_ends} wrong, "
        f"KeyboardInterrupt came out within {longest:.2f} s",
        flush=True,
    )
    return 1 if hangs or wrong_ends else 0


def run_on_all(arguments: list[str]) -> int:
    lines = subprocess.check_output([os.path.join(HERE, "linux-python")], text=True).splitlines()
    versions = [line.split()[0] for line in lines]
    statuses = [
        subprocess.call(
            [os.path.join(HERE, "wine-python"), "--python", version, __file__, *arguments]
        )
        for version in dict.fromkeys((versions[0], versions[-1]))
    ]
    return max(statuses)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--twice", action="store_true")
    parser.add_argument("--python", metavar="3.X")
    options = parser.parse_args()
    if sys.platform == "win32":
        status = main(options.step, options.only, twice=options.twice)
        sys.stdout.flush()
        os._exit(status)  # a thread may hang
    elif options.python:
        wine_python = os.path.join(HERE, "wine-python")
        os.execv(wine_python, [wine_python, "--python", options.python, __file__, *sys.argv[1:]])
    else:
        sys.exit(run_on_all(sys.argv[1:]))
