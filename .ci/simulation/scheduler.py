"""Who goes on, and when: one thing runs at a time, a seed decides which, and time is virtual.

Each simulated thread is a greenlet. It gives way at switch points only: the calls into the kernel,
sleeps, and in the deep mode each bytecode of vmshim.py. All that a run decides (who is next, what
fails, what is late) goes through one `Decisions` object.

Two ways to choose who is next: uniformly at random, and PCT (Burckhardt and others, "A randomized
scheduler with probabilistic guarantees of finding bugs", ASPLOS 2010): each thread has a random
priority, the highest one that can runs, and at a few random moments the running one becomes the
lowest.
"""

from __future__ import annotations

import heapq
import math
import random
from typing import Any, Callable

from simulation.fibers import Greenlet, GreenletExit, get_current
from simulation.kernel import Process

STEP = 2e-6  # seconds that pass between two switch points
MAX_STEPS = 60_000  # more than that is a livelock
MAX_SECONDS = 120.0  # of virtual time: no scenario takes longer


class Task:
    """A simulated thread."""

    def __init__(self, process: Process, name: str) -> None:
        self.process = process
        self.name = name
        self.label = f"{process.name}/{name}"
        self.last_error = 0
        self.sleeping = False
        self.token = 0  # which of its sleeps it is in
        self.woken = False
        self.ended = False
        self.priority = 0.0
        self.points = 0  # how often it could have been interrupted
        self.interrupts: list[int] = []  # at which of those it is, in order
        self.interrupted_at = 0.0
        self.interruptions = 0
        self.interrupted_in = ""
        self.paused = 0.0  # seconds of time.sleep()
        self.waited_at = 0.0  # when its last wait for a signal ended
        self.greenlet: Any = None

    def __repr__(self) -> str:
        return self.label


class Decisions:
    """Makes the decisions of a run from a seed, and remembers those that aren't the plain ones."""

    def __init__(
        self, seed: int, *, pct: bool = False, fault_rate: float = 0.0, late_rate: float = 0.0
    ) -> None:
        self.random = random.Random(seed)
        self.pct = pct
        self.late_rate = late_rate
        self.fault_rate = fault_rate
        self.switches: dict[int, str] = {}
        self.faults: dict[int, float] = {}
        self.asked = 0
        self.next_fault = self._skip()
        self.changes = {self.random.randrange(2000) for _ in range(4)} if pct else set()
        self.lowest = 0.0

    def _skip(self) -> int:
        """Return how many chances for a fault pass before the next."""
        if not self.fault_rate:
            return -1
        return 1 + int(math.log(1 - self.random.random()) / math.log(1 - self.fault_rate))

    def pick(self, tasks: list[Task], current: Task | None, step: int) -> Task:
        """Choose who goes on."""
        if self.pct:
            if step in self.changes and current:
                self.lowest -= 1
                current.priority = self.lowest
            chosen = max(tasks, key=lambda task: task.priority)
        else:
            chosen = tasks[int(self.random.random() * len(tasks))]
        if chosen is not current:
            self.switches[step] = chosen.label
        return chosen

    def preempts(self, bytecode: int, rate: float) -> bool:
        """Tell whether another thread goes on at this bytecode (their numbers are below 0)."""
        return self.random.random() < rate

    def fault(self) -> float:
        """Return 0 for no fault, mostly; else a random number that says which or how much."""
        self.next_fault -= 1
        if self.next_fault:
            return 0.0
        self.next_fault = self._skip()
        size = self.random.random()
        return size or 0.5

    def late(self) -> float:
        """Return 0 if the kernel is on time, or else a random number that says how late it is."""
        if self.random.random() >= self.late_rate:
            return 0.0
        return self.random.random() or 0.5

    def priority(self) -> float:
        """Return the priority of a new thread."""
        return self.random.random() + 1


class Scheduler:
    """The world of one run: its clock, its threads, its history."""

    def __init__(self, decisions: Decisions, *, keep_history: bool = False) -> None:
        self.decisions = decisions
        self.now = 1000.0
        self.started = self.now
        self.current: Any = None
        self.runnable: list[Task] = []
        self.tasks: list[Task] = []
        self.timers: list[tuple[float, int, Any, int]] = []
        self.serial = 0
        self.steps = 0
        self.looks = 0
        self.violations: list[str] = []
        self.keep_history = keep_history
        self.history: list[tuple[float, str, str]] = []
        self.jumped = 0.0  # virtual time that faults have taken
        self.jumped_at = 0.0
        self.bytecodes = 0  # counted downwards, so that they can't be taken for steps
        self.trace_again: Callable[[], None] | None = None
        self.max_steps = MAX_STEPS
        self.max_seconds = MAX_SECONDS
        self.hub = get_current()
        self.ending = False
        self.actions: dict[int, Callable[[], None]] = {}  # what happens at a step

    # What the kernel asks for.

    def block(self, deadline: float) -> bool:
        """Put the current thread to sleep; return whether it was woken before the deadline."""
        task = self.current
        if self.ending or task is None:
            raise GreenletExit
        if deadline <= self.now:
            return False
        task.token += 1
        task.woken = False
        task.sleeping = True
        self.runnable.remove(task)
        if deadline < math.inf:
            self._add_timer(deadline + 5 * self.delay("wake"), task, task.token)
        self._switch(self._next())
        woken: bool = task.woken
        return woken

    def wake(self, task: Task) -> None:
        """Make a sleeping thread able to go on."""
        if task.sleeping:
            task.sleeping = False
            task.woken = True
            self.runnable.append(task)

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Have something happen after some virtual time."""
        self._add_timer(self.now + seconds, action, -1)

    def delay(self, what: str) -> float:
        """Tell how late the kernel does something this time, in seconds; mostly 0."""
        size = self._take_note(self.decisions.late(), f"late {what}")
        if not size:
            return 0.0
        seconds = size * size * 2e-3
        self.jumped += 5 * seconds
        return seconds

    def chance(self, probability: float) -> bool:
        """Toss a coin."""
        return self._take_note(self.decisions.late(), "coin") > 1 - probability

    def fault(self, what: str) -> float:
        """Return 0, or how large a fault is, from above 0 to below 1."""
        return self._take_note(self.decisions.fault(), what)

    def _take_note(self, size: float, what: str) -> float:
        decisions = self.decisions
        if size:
            decisions.faults[decisions.asked] = size
            self.note(f"*** fault {size:.3f} at: {what}")
        decisions.asked += 1
        return size

    def broken(self, rule: str, text: str) -> None:
        """Take note that a rule is broken; the run ends at the next switch point."""
        self.violations.append(f"{rule}: {text}")
        self.note(f"!!! {rule}: {text}")

    def note(self, text: str) -> None:
        """Add a line to the history."""
        if self.keep_history and not self.ending:
            self.history.append((self.now - self.started, repr(self.current), text))

    def interrupted(self, task: Task, what: str) -> None:
        """Take note of a Ctrl-C."""
        task.interrupted_at = self.now
        task.interruptions += 1
        task.interrupted_in = what
        self.note(f"*** Ctrl-C at: {what}")

    def jump(self, seconds: float) -> None:
        """Move the clock forward, as when the machine has slept."""
        self.now += seconds
        self.jumped += seconds
        self.jumped_at = self.now
        self.note(f"*** the clock jumps by {seconds:.3f} s")

    # Threads.

    def spawn(self, process: Process, name: str, function: Callable[[], object]) -> Task:
        """Start a thread; it runs when it is chosen."""
        task = Task(process, name)
        task.priority = self.decisions.priority()
        task.greenlet = Greenlet(lambda: self._body(task, function), self.hub)
        self.tasks.append(task)
        self.runnable.append(task)
        return task

    def _body(self, task: Task, function: Callable[[], object]) -> None:
        try:
            function()
        except GreenletExit:
            pass
        finally:
            task.ended = True
            self.note("ends")
            if task in self.runnable:
                self.runnable.remove(task)
        if not self.ending:
            self.current = self._next()
            # The dying greenlet hands over to its parent, the hub, which goes on with this one.

    def kill(self, process: Process) -> None:
        """Take a process' threads away; not a line of theirs runs any more."""
        for task in self.tasks:
            if task.process is process and not task.ended:
                task.ended = True
                task.sleeping = False
                if task in self.runnable:
                    self.runnable.remove(task)
        if self.current and self.current.process is process:
            self._switch(self._next())

    def point(self) -> None:
        """Let another thread go on, perhaps."""
        task = self.current
        if self.ending or task is None:
            raise GreenletExit
        self.steps += 1
        self.looks = 0
        self.now += STEP
        if self.trace_again:
            self.trace_again()
        if self.violations or self.steps > self.max_steps:
            if not self.violations:
                self.broken("livelock", f"no end after {self.max_steps} switch points")
            self._stop()
        if self.steps in self.actions:
            self.actions[self.steps]()
        if self.timers and self.timers[0][0] <= self.now:
            self._fire()
        if len(self.runnable) > 1:
            chosen = self.decisions.pick(self.runnable, task, self.steps)
            if chosen is not task:
                self._switch(chosen)

    def look_at_clock(self) -> None:
        """Whoever looks again and again without a switch point would never come to an end."""
        self.looks += 1
        if self.looks > MAX_STEPS and not self.ending:
            self.broken("livelock", f"the clock is looked at {self.looks} times in a row")
            self._stop()

    def bytecode(self, rate: float) -> None:
        """Perhaps let another thread go on, between two bytecodes of the current one."""
        self.bytecodes -= 1
        if len(self.runnable) > 1 and self.decisions.preempts(self.bytecodes, rate):
            if self.violations:
                self._stop()
            others = [task for task in self.runnable if task is not self.current]
            self._switch(self.decisions.pick(others, None, self.bytecodes))

    def sleep(self, seconds: float) -> None:
        """Let virtual time pass for the current thread."""
        self.point()
        self.block(self.now + max(seconds, STEP))

    def _next(self) -> Task | None:
        """Return who goes on when the current thread can't; the time moves on if nobody can."""
        if self.violations:
            return None
        if self.timers and self.timers[0][0] <= self.now:
            self._fire()
        while not self.runnable:
            if not self.timers:
                if any(not task.ended for task in self.tasks):
                    asleep = ", ".join(repr(task) for task in self.tasks if not task.ended)
                    self.broken("deadlock", f"nothing will ever wake {asleep}")
                return None
            self.now = max(self.now, self.timers[0][0])
            if self.now - self.started > self.max_seconds + self.jumped:
                awake = ", ".join(repr(task) for task in self.tasks if not task.ended)
                self.broken("endless", f"after {self.max_seconds:.1f} s there still is {awake}")
                return None
            self._fire()
        if len(self.runnable) == 1:
            return self.runnable[0]
        return self.decisions.pick(self.runnable, None, self.steps)

    def _switch(self, task: Task | None) -> None:
        if task is self.current and task is not None:
            return
        self.current = task
        if task is None:
            self.hub.switch()
        else:
            task.greenlet.switch()
        if self.ending:
            raise GreenletExit

    def _stop(self) -> None:
        self.current = None
        self.hub.switch()
        raise GreenletExit

    def _add_timer(self, time: float, what: Any, token: int) -> None:
        self.serial += 1
        heapq.heappush(self.timers, (time, self.serial, what, token))

    def _fire(self) -> None:
        while self.timers and self.timers[0][0] <= self.now:
            _, _, what, token = heapq.heappop(self.timers)
            if token < 0:
                what()
            elif what.sleeping and what.token == token:
                what.sleeping = False
                self.runnable.append(what)

    def run(self) -> None:
        """Go on until all threads have ended, or a rule is broken."""
        self.current = self._next()
        while self.current is not None and not self.violations:
            self.current.greenlet.switch()
        self.current = None

    def finish(self) -> None:
        """End what is left of all threads, without letting them do anything."""
        self.ending = True
        for task in self.tasks:
            if task.greenlet:
                task.greenlet.throw(GreenletExit)
