"""The deep mode: a switch point, and a chance for Ctrl-C, at each bytecode of vmshim.py.

CPython 3.8 looks for signals before nearly every bytecode; so does this, on whatever Python it
runs. Another thread may go on between any two bytecodes, too. While a thread has been stopped in
the middle of a line, CPython traces no other, so one thread at a time can be stopped like that;
the others go on to their ordinary switch points meanwhile.
"""

from __future__ import annotations

import dis
import sys
from types import FrameType
from typing import Any

from simulation.rules import Run
from simulation.scheduler import Task

# 3.8 doesn't look for signals before SETUP_FINALLY and SETUP_WITH, which later became the first of
# these; the others are steps of raising an exception or resuming a generator, where nobody looks.
_SKIPPED = frozenset(
    (
        *("NOP", "CACHE", "PUSH_NULL", "RESUME", "PRECALL", "BEFORE_WITH"),
        *("PUSH_EXC_INFO", "POP_EXCEPT", "RERAISE", "COPY", "RETURN_GENERATOR", "SEND"),
    )
)


class Tracer:
    """Traces vmshim's code during a run."""

    def __init__(self) -> None:
        self.run: Any = None
        self.skipped: dict[Any, frozenset[int]] = {}

    def start(self, run: Run) -> None:
        """Begin with a run."""
        self.run = run
        run.scheduler.trace_again = self.trace_again
        sys.settrace(self.call)

    def trace_again(self) -> None:
        """CPython stops tracing when a trace function raises, as it does for Ctrl-C."""
        if sys.gettrace() is None:
            sys.settrace(self.call)

    def stop(self) -> None:
        """End with a run."""
        sys.settrace(None)
        self.run = None

    def call(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Look at the bytecodes of vmshim.py only."""
        if frame.f_code.co_filename != "vmshim.py":
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        return self.opcode

    def opcode(self, frame: FrameType, event: str, argument: Any) -> Any:
        """Perhaps let another thread go on here; perhaps raise KeyboardInterrupt."""
        if event != "opcode":
            return self.opcode
        run = self.run
        scheduler = run.scheduler
        task: Task | None = scheduler.current
        if task is None or scheduler.ending or task.process.dead:
            return self.opcode
        if frame.f_lasti in self._skipped_in(frame):
            return self.opcode
        scheduler.bytecode(run.deep_rate)
        if task.interrupts:
            task.points += 1
            if task.points == task.interrupts[0]:
                del task.interrupts[0]
                scheduler.interrupted(task, f"line {frame.f_lineno}")
                raise KeyboardInterrupt
        return self.opcode

    def _skipped_in(self, frame: FrameType) -> frozenset[int]:
        code = frame.f_code
        found = self.skipped.get(code)
        if found is None:
            instructions = dis.get_instructions(code)
            found = frozenset(i.offset for i in instructions if i.opname in _SKIPPED)
            self.skipped[code] = found
        return found
