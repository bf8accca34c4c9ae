"""What a run is made of, and the rules that it must keep.

A run is a scenario drawn from its seed: processes that run vmshim.py's clients and its server,
peers that behave badly on the bare kernel, and faults. The ledger has what each client asked for
and saw, and what the handler did; when all is over, and while it goes on, these must agree:

- a request is carried out at most once, one at a time, and in the order of arrival;
- a client that saw success was carried out, one that saw ShimError was refused, one that saw
  NotSentError was never carried out; with an unknown outcome, or after Ctrl-C, all is possible;
- nobody sees any other exception, and everybody ends within the timeout and 0.2 s;
- a process that is through has no handle, thread or operation left, and nothing is closed twice,
  freed or used at a wrong time (kernel.py sees to that);
- a silent client delays nobody.
"""

from __future__ import annotations

import random
from typing import Any, Callable

from simulation.environment import Slot, start_thread
from simulation.fibers import GreenletExit
from simulation.kernel import Kernel, Process
from simulation.scheduler import Decisions, Scheduler, Task

PATH = "\\\\.\\pipe\\vmshim-simulated"
TOLERANCE = 0.2  # seconds over a timeout
REFUSALS = {"refuse": "refused ", "bug": "bug "}
UNHEARD = [
    "the VM shim stopped before it had carried the request out",
    "no complete request came in time",
]
STOP_SECONDS = 1.2  # in which a server that stops has done so


class Request:
    """One request in the ledger."""

    def __init__(self, id_: str, connect_timeout: float, timeout: float | None) -> None:
        self.id = id_
        self.connect_timeout = connect_timeout
        self.timeout = timeout
        self.answer = "success"  # what the handler will do
        self.seconds = 0.0  # how long it takes the handler
        self.began = 0.0
        self.sent = 0.0  # when all of it was with the server
        self.outcome = "none"
        self.must_be_refused = False
        self.must_be_answered = False
        self.expected: tuple[str, ...] = ()  # the outcomes that may be, if not all may
        self.message = ""
        self.handled: list[float] = []


class Run:
    """One run: the world, the ledger, and the processes."""

    count = 0  # each run's handles have values of their own

    def __init__(
        self, slots: list[Slot], seed: int, decisions: Decisions, *, keep_history: bool = False
    ) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.scheduler = Scheduler(decisions, keep_history=keep_history)
        self.kernel = Kernel(self.scheduler)
        self.slots = slots
        Run.count += 1
        self.first_handle = Run.count % 0x4000 * 0x10000 + 4
        self.used = 0
        self.requests: dict[str, Request] = {}
        self.peers: list[Task] = []
        self.without: frozenset[str] = frozenset()  # faults that are left out
        self.deep = False
        self.fine = self.random.random() < 0.3  # a switch point after each call, too
        self.deep_rate = random.Random(seed).choice((0.0, 0.001, 0.01))
        self.bad_server = False  # the requests go to a server that isn't vmshim's
        self.handling = 0
        self.order: list[str] = []
        self.killed = False
        self.stopping = False
        self.quiet = False
        self.cut_off_after: float | None = None  # how long the server lets a client be silent
        self.must_answer = False  # nothing goes wrong, so each request must be answered
        self.honest_limit = 0.0  # how long an honest client may take at most, if it isn't 0

    # Processes.

    def new_slot(self, name: str) -> Slot:
        """Start a process that runs vmshim.py."""
        slot = self.slots[self.used]
        self.used += 1
        process = Process(name, first_handle=self.first_handle)
        slot.begin(self.scheduler, self.kernel, process)
        slot.fine = self.fine
        return slot

    def main(self, slot: Slot, function: Callable[[], None]) -> Task:
        """Start a process' main thread, the one that Ctrl-C hits."""
        task = start_thread(self.kernel, slot.process, "main", function)
        task.is_main = True
        return task

    def kill(self, process: Process) -> None:
        """End a process at a bad moment."""
        if not process.dead:
            self.killed = True
            self.scheduler.note(f"*** {process.name} is killed")
            self.end_process(process)

    def end_process(self, process: Process) -> None:
        """End a process, whatever it does."""
        if not process.dead:
            self.kernel.end_process(process)
            self.scheduler.kill(process)

    def faulty(self) -> bool:
        """Tell whether calls fail in some process."""
        return any(slot.faulty for slot in self.slots[: self.used])

    def broken(self, rule: str, text: str) -> None:
        """Take note that a rule is broken."""
        self.scheduler.broken(rule, text)

    def check_clean(self, slot: Slot, when: str) -> None:
        """A process that is through has nothing left, and needs no garbage collection for that."""
        process = slot.process
        under_way = slot.module.__dict__["_under_way"]
        if process.handles:
            kinds = ", ".join(type(handle).__name__ for handle in process.handles.values())
            self.broken("left", f"{process.name} has handles left {when}: {kinds}")
        if process.operations:
            kinds = ", ".join(operation.kind for operation in process.operations)
            self.broken("left", f"{process.name} has operations pending {when}: {kinds}")
        if under_way:
            self.broken("left", f"{process.name} keeps memory of operations {when}")
        threads = [
            task.name
            for task in self.scheduler.tasks
            if task.process is process and task.name == "thread" and not task.ended
        ]
        if threads:
            self.broken("left", f"{process.name} has a thread left {when}")

    def run(self, build: Callable[[Run], None]) -> list[str]:
        """Go from the beginning to the end; return the rules that were broken."""
        build(self)
        self.scheduler.run()
        if not self.scheduler.violations:
            self.check_ledger()
        return self.scheduler.violations

    def end(self) -> None:
        """Take everything down."""
        self.scheduler.finish()
        for slot in self.slots[: self.used]:
            slot.end()

    # The ledger.

    def new_request(self, id_: str) -> Request:
        """Draw a request."""
        draw = self.random
        timeout = draw.choice((0.0, 0.01, 0.1, 1.0, 5.0, 5.0, 5.0, 20.0))
        request = Request(id_, draw.choice((0.0, 0.05, 0.5, 0.5, 2.0)), timeout)
        request.answer = draw.choice(("success", "success", "success", "refuse", "bug"))
        request.seconds = draw.choice((0.0, 0.0, 0.0, 0.001, 0.02))
        self.requests[id_] = request
        return request

    def handle(self, slot: Slot, vm_request: Any) -> None:
        """The server's handler."""
        request = self.requests.get(vm_request.id)
        if request is None:
            self.broken("ledger", f"the handler got {vm_request!r}, which nobody sent")
            return
        now = self.scheduler.now
        if self.handling:
            self.broken("one at a time", f"{request.id} while another is handled")
        if request.handled:
            self.broken("once", f"{request.id} is carried out again")
        request.handled.append(now)
        self.order.append(request.id)
        self.handling += 1
        try:
            self.scheduler.note(f"handles {request.id}: {request.answer}")
            if request.seconds:
                self.scheduler.block(now + request.seconds)
            if request.answer == "refuse":
                raise slot.module.__dict__["ShimError"](f"refused {request.id}")
            if request.answer == "bug":
                raise RuntimeError(f"bug {request.id}")
            if request.answer == "exit":
                self.stopping = True
                raise SystemExit
        finally:
            self.handling -= 1

    def issue(self, slot: Slot, request: Request) -> None:
        """Issue a request as vmshim's client does, and write down what came of it."""
        module = slot.module.__dict__
        request.began = self.scheduler.now
        jumped = self.scheduler.jumped
        try:
            module["issue_vm_request"](
                PATH,
                module["VMRequest"](request.id, "create"),
                connect_timeout=request.connect_timeout,
                timeout=request.timeout,
            )
            request.outcome = "success"
        except module["ShimError"] as error:
            request.outcome, request.message = "refused", error.message
        except module["NotSentError"]:
            request.outcome = "not sent"
        except module["OutcomeUnknownError"] as error:
            request.outcome = "unknown"
            self.check_error(error)
            if isinstance(error, TimeoutError):
                self._check_early(slot, request, jumped)
        except KeyboardInterrupt:
            request.outcome = "interrupted"
            took = self.scheduler.now - self.scheduler.current.interrupted_at
            if took > 1.0 + self.scheduler.jumped:
                self.broken("timeout", f"Ctrl-C came out after {took:.3f} s")
        except GreenletExit:
            raise
        except BaseException as error:
            self.broken("exception", f"a client got {error!r}")
        self.scheduler.note(f"{request.id}: {request.outcome} {request.message}")
        took = self.scheduler.now - request.began - (self.scheduler.jumped - jumped)
        if self.honest_limit and request.outcome == "success" and took > self.honest_limit:
            self.broken("silence", f"{request.id} took {took:.3f} s beside silent clients")
        if request.timeout is not None:
            allowed = request.connect_timeout + request.timeout + TOLERANCE
            if took > allowed:
                self.broken("timeout", f"{request.id} took {took:.3f} s, not {allowed:.3f}")

    def check_error(self, error: BaseException) -> None:
        """Windows' "not ended yet" is nothing that a caller may see."""
        if getattr(error, "winerror", 0) in (996, 997):
            self.broken("exception", f"{error!r} came out")

    def _check_early(self, slot: Slot, request: Request, jumped: float) -> None:
        took = self.scheduler.now - request.began + self.scheduler.jumped - jumped
        if took + slot.clock_step + 0.001 < (request.timeout or 0.0):
            self.broken("timeout", f"{request.id} was given up after {took:.3f} s")

    def check_ledger(self) -> None:
        """Compare what clients saw with what the handler did."""
        for request in self.requests.values():
            if self.bad_server:
                self._check_bad_server(request)
                continue
            handled = bool(request.handled)
            outcome, answer = request.outcome, request.answer
            if request.expected and outcome not in request.expected:
                self.broken("bound", f"{request.id} saw {outcome}, not {request.expected[0]}")
            patient = (request.timeout or 0) >= 1.0 + self.scheduler.jumped
            answered = outcome in ("success", "refused", "none") or not patient
            if request.must_be_answered and self.quiet and not answered and answer != "exit":
                self.broken("ledger", f"{request.id} was under way and saw {outcome}")
            if self.must_answer and outcome not in ("success", "refused"):
                self.broken("calm", f"{request.id} saw {outcome}, and nothing had gone wrong")
            if outcome == "success" and not (handled and answer == "success"):
                self.broken("ledger", f"{request.id} saw success: {answer}, handled: {handled}")
            elif outcome == "not sent" and handled:
                self.broken("ledger", f"{request.id} saw 'not sent' and was carried out")
            elif outcome == "refused":
                expected = [REFUSALS[answer] + request.id] if handled and answer in REFUSALS else []
                expected += ["\0OK\0"] if answer == "success" else []
                expected += [] if handled else UNHEARD
                # Who reads a byte at a time may see the server die in the middle of its text, or
                # give the client up when a call fails or the clock jumps.
                seen = request.message
                cut = self.killed or self.faulty() or self.scheduler.jumped
                whole = seen in expected and seen != "\0OK\0"
                if not whole and not (cut and any(e.startswith(seen) for e in expected)):
                    self.broken("ledger", f"{request.id} saw {seen!r}: {answer}")
        self._check_order()

    def _check_bad_server(self, request: Request) -> None:
        """Compare what a client saw with what a server has answered that isn't vmshim's."""
        outcome, answer = request.outcome, request.answer
        cut_short = answer == "tail" and self.killed  # before it could send the tail
        if outcome == "success" and not (request.handled and answer == "success") and not cut_short:
            self.broken("ledger", f"{request.id} saw success of {answer}")
        if outcome == "not sent" and request.handled:
            self.broken("ledger", f"{request.id} saw 'not sent' and was carried out")
        texts = {"tail": "\0OK\0x", "truncate": "\0OK", "refuse": f"refused {request.id}"}
        if outcome == "refused" and not self.killed and request.message != texts.get(answer):
            self.broken("ledger", f"{request.id} saw {request.message!r} of {answer}")
        may_be_cut = (request.timeout or 0.0) < 1.0 or outcome == "interrupted"
        if request.must_be_refused and self.quiet and not may_be_cut and outcome != "refused":
            self.broken("ledger", f"{request.id} was refused early and saw {outcome}")

    def _check_order(self) -> None:
        """Who had sent everything before another one began is handled first."""
        late = self.scheduler.jumped
        handled = [self.requests[id_] for id_ in self.order]
        for place, request in enumerate(handled):
            for later in handled[place + 1 :]:
                if later.sent and later.sent + 0.005 + late < request.began:
                    self.broken("order", f"{request.id} was handled before {later.id}")


def decisions_for(seed: int) -> Decisions:
    """Draw how a run is scheduled."""
    draw = random.Random(seed ^ 0x5EED)
    return Decisions(
        seed,
        pct=draw.random() < 0.4,
        fault_rate=draw.choice((0.0, 0.003, 0.02, 0.1)),
        late_rate=draw.choice((0.0, 0.0, 0.02, 0.2, 0.6)),
    )
