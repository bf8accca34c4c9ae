"""What a run is made of, and the rules that it must keep.

A run is a scenario drawn from its seed: processes that run vmshim.py's clients and its server,
peers that behave badly on the bare kernel, and faults. The ledger has what each client asked for
and saw, and what the handler did; when all is over, and while it goes on, these must agree:

- a request is carried out at most once, one at a time, and in the order of arrival; not before all
  of the client's message is read, and not if the client had gone before the handler began;
- a client that saw success was carried out, one that saw ShimError was refused, by these bytes, one
  that saw NotSentError was never carried out; with an unknown outcome, or after Ctrl-C, all is
  possible; whoever timed out while the request was not wholly read is told "not sent";
- a client is told as soon as the handler is done with its request, whatever the next one takes, and
  nobody whose request had come is told that none came in time;
- nobody sees any other exception, and everybody ends within the timeout and 0.2 s;
- a process that is through has no handle, operation or descriptor left; nothing is closed twice, or
  used at a wrong time (kernel.py sees to that); an exception keeps no handle open;
- a silent client delays nobody, and whoever has no right to open the pipe never gets an instance.
"""

from __future__ import annotations

import math
import random
import re
from typing import Any, Callable

from simulation.environment import Slot, start_thread
from simulation.fibers import GreenletExit
from simulation.kernel import CANCELLED, SUCCESS, File, Kernel, Operation, Process
from simulation.scheduler import STEP, Decisions, Scheduler, Task

PATH = "\\\\.\\pipe\\vmshim-simulated"
TOLERANCE = 0.2  # seconds over a timeout
TOO_LATE = b"no complete request came in time"
UNHEARD = [b"the VM shim stopped before it had carried the request out", TOO_LATE]
TOLD_SECONDS = 0.02  # in which a client that waits is told that the handler is done
# How long an object, without its newline, is where the reference's server can have read all of it,
# but not the newline: its buffer grows from 512 bytes to twice its size and 512.
FULL_BUFFERS = [512 * (2**k - 1) for k in range(1, 12)]
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
        self.outcome = "none"
        self.must_be_refused = False
        self.must_be_answered = False
        self.expected: tuple[str, ...] = ()  # the outcomes that may be, if not all may
        self.response = b""
        self.timed_out = False
        self.goes_on = False  # its client sends more, which costs it its place in line
        self.handled: list[float] = []
        self.ended: tuple[float, float] | None = None  # when the handler had ended; jumped by then
        self.told = 0.0
        self.refusal: tuple[str, bytes] = (f"refused {id_}", b"")  # what a refusal is made of
        self.file: File | None = None  # the client's end
        self.write: Operation | None = None  # of the end of its object

    def __str__(self) -> str:
        return self.id.rstrip("x")

    def fills_a_buffer(self) -> bool:
        """Tell whether a server like the reference's has all of its object, but not the newline."""
        return len(self.id) + 23 in FULL_BUFFERS

    def has_arrived(self) -> float:
        """Return when the server had read all of it; infinity if it hasn't."""
        if self.write is None or self.write.status != SUCCESS:
            return math.inf
        server = self.write.file.instance.server
        return max(self.write.ended_at, server.last_read if server else 0.0)

    def expected_bytes(self) -> bytes:
        """Return what the client is to be told if its request is refused."""
        if self.answer == "bug":
            return f"bug {self.id}".encode()
        message, response = self.refusal
        return response or message.encode()


class Run:
    """One run: the world, the ledger, and the processes."""

    count = 0  # each run's handles have values of their own

    def __init__(
        self, slots: list[Slot], seed: int, decisions: Decisions, *, keep_history: bool = False
    ) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.scheduler = Scheduler(decisions, keep_history=keep_history)
        self.broken = self.scheduler.broken
        self.kernel = Kernel(self.scheduler)
        self.kernel.on_write = self._written
        self.written: dict[File, bytes] = {}
        self.fixed_texts: set[bytes] = set()  # told instead of a text that can't be sent
        self.slots = slots
        Run.count += 1
        self.first_handle = Run.count % 0x4000 * 0x10000 + 4
        self.used = 0
        self.requests: dict[str, Request] = {}
        self.peers: list[Task] = []
        self.deep = False
        self.fine = self.random.random() < 0.3  # a switch point after each call, too
        self.deep_rate = random.Random(seed).choice((0.0, 0.001, 0.01))
        self.strangers_may_open = False
        self.bad_server = False  # the requests go to a server that isn't vmshim's
        self.handling = 0
        self.handling_since = 0.0
        self.handled_before = 0.0
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
        return start_thread(self.kernel, slot.process, "main", function)

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

    def is_calm(self, jumped: float) -> bool:
        """Tell whether nothing has gone wrong so far, and the clock is about right."""
        interrupted = any(task.interruptions for task in self.scheduler.tasks)
        late = self.scheduler.jumped - jumped
        return not (self.killed or self.faulty() or interrupted or late >= TOLERANCE)

    def check_clean(self, slot: Slot, when: str) -> None:
        """A process that is through has nothing left, and needs no garbage collection for that.

        A third Ctrl-C may leave an operation and its memory.
        """
        process = slot.process
        under_way = slot.module.__dict__["_under_way"]
        if process.handles:
            kinds = ", ".join(type(handle).__name__ for handle in process.handles.values())
            self.broken("left", f"{process.name} has handles left {when}: {kinds}")
        if any(process.descriptors.values()):
            self.broken("left", f"{process.name} keeps a security descriptor {when}")
        if self.scheduler.current.interruptions > 2:
            return
        if under_way and self.scheduler.current.interruptions:
            while process.operations and all(each.cancelled for each in process.operations):
                self.scheduler.sleep(STEP)  # Windows is late with the end
        if process.operations:
            kinds = ", ".join(operation.kind for operation in process.operations)
            self.broken("left", f"{process.name} has operations pending {when}: {kinds}")
        if under_way:
            self.broken("left", f"{process.name} keeps memory of operations {when}")

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
        request.seconds = draw.choice((0.0, 0.0, 0.0, 0.001, 0.02, 0.3))
        text = f"refused {request}"
        refusals = [
            (text, b""),
            (text + "\r\nfor this:\n", b""),
            (text + ": \u20ac \U0001f600", b""),
        ]
        refusals += [(text, b"\xff\xfe " + id_[:9].encode() + b"\n"), (text * 9000, b"")]
        refusals += [("", b""), ("\n", b""), ("\0OK\0", b""), ("not this", b"\0OK\0")]
        request.refusal = draw.choice((refusals[0], *refusals))
        self.requests[id_] = request
        return request

    def _written(self, operation: Operation) -> None:
        """Somebody writes: see whose request it is, and when it is told that none came."""
        file = operation.file
        if file.is_server:
            if operation.written == TOO_LATE:
                self._check_too_late(file)
            return
        sent = self.written[file] = (self.written.get(file, b"") + operation.written)[:20000]
        match = re.search(rb'"ID":"([^"]*)".*}', sent)
        request = self.requests.get(match[1].decode()) if match else None
        if request and not request.file:
            request.file, request.write = file, operation

    def _check_too_late(self, file: File) -> None:
        """What has ended counts first, and only then whose time is over."""
        looked = self.scheduler.current.waited_at
        for request in self.requests.values():
            is_its = request.file and request.file.instance is file.instance
            if is_its and request.has_arrived() < looked:
                self.broken("too late", f"{request} had come, and is told it is too late")

    def handle(self, slot: Slot, vm_request: Any, called: float) -> None:
        """The server's handler, which was called at this time."""
        request = self.requests.get(vm_request.id)
        if request is None:
            self.broken("ledger", f"the handler got {vm_request!r}, which nobody sent")
            return
        now = self.scheduler.now
        if self.handling:
            self.broken("one at a time", f"{request} while another is handled")
        if request.handled:
            self.broken("once", f"{request} is carried out again")
        self._check_whole(request, called)
        request.handled.append(now)
        self.order.append(request.id)
        self.handling += 1
        self.handling_since = now
        try:
            self.scheduler.note(f"handles {request}: {request.answer}")
            if request.seconds:
                slot.modules["time"].sleep(request.seconds)
            request.ended = self.scheduler.now, self.scheduler.jumped
            if request.answer == "refuse":
                raise slot.module.__dict__["ShimError"](*request.refusal)
            if request.answer == "bug":
                raise RuntimeError(f"bug {request.id}")
            if request.answer == "exit":
                self.stopping = True
                raise SystemExit
        finally:
            self.handled_before = self.seconds_handled()
            self.handling -= 1
            # Meanwhile the server could not see that Windows had refused it an instance.
            slot.process.refused_at += self.scheduler.now - now

    def seconds_handled(self) -> float:
        """Return for how long a handler has run so far, in all."""
        current = self.scheduler.now - self.handling_since if self.handling else 0.0
        return self.handled_before + current

    def _check_whole(self, request: Request, called: float) -> None:
        """All of the client's message must have been read, and the client must be there."""
        file, write = request.file, request.write
        if not (file and write):
            self.broken("ledger", f"{request} is carried out, and nobody has sent it")
            return
        if not write.finished or write.status == CANCELLED:
            self.broken("whole", f"{request} is carried out before all of it is read")
        server = file.instance.server
        told = min(server.told_gone if server else math.inf, file.closed_at + 0.0025)
        moment = 0.02 if self.deep else 0.0  # the server may have looked a moment ago
        jumped_just_now = self.scheduler.now - self.scheduler.jumped_at < 0.01
        if told + moment < called and not jumped_just_now:
            self.broken("gone", f"{request} is carried out, and its client had gone")

    def issue(self, slot: Slot, request: Request) -> None:
        """Issue a request as vmshim's client does, and write down what came of it."""
        module = slot.module.__dict__
        request.began = self.scheduler.now
        paused = self.scheduler.current.paused  # who lost an instance to another stands back
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
            request.outcome, request.response = "refused", error.response
            self._check_kept(slot, error)
        except module["NotSentError"] as error:
            request.outcome = "not sent"
            self._check_kept(slot, error)
            if isinstance(error, TimeoutError):
                is_busy = isinstance(error, module["PipeBusyError"])
                seconds = request.connect_timeout if is_busy else request.timeout
                self._check_early(slot, request, jumped, seconds)
        except module["OutcomeUnknownError"] as error:
            request.outcome = "unknown"
            request.timed_out = isinstance(error, TimeoutError)
            self.check_error(error)
            self._check_kept(slot, error)
            if request.timed_out:
                self._check_early(slot, request, jumped, request.timeout)
        except KeyboardInterrupt as error:
            request.outcome = "interrupted"
            self._check_kept(slot, error)
            took = self.scheduler.now - self.scheduler.current.interrupted_at
            if took > 0.3 + self.scheduler.jumped:
                self.broken("timeout", f"Ctrl-C came out after {took:.3f} s")
        except GreenletExit:
            raise
        except BaseException as error:
            self.broken("exception", f"a client got {error!r}")
        request.told = self.scheduler.now
        self.scheduler.note(f"{request}: {request.outcome} {request.response[:80]!r}")
        self._check_told(slot, request)
        took = self.scheduler.now - request.began - (self.scheduler.jumped - jumped)
        waited = took - (self.scheduler.current.paused - paused)
        if self.honest_limit and request.outcome == "success" and waited > self.honest_limit:
            self.broken("silence", f"{request} took {took:.3f} s beside silent clients")
        if request.timeout is not None:
            allowed = request.connect_timeout + request.timeout + TOLERANCE
            if took > allowed:
                self.broken("timeout", f"{request} took {took:.3f} s, not {allowed:.3f}")

    def _check_kept(self, slot: Slot, error: BaseException) -> None:
        """An exception that somebody keeps must not keep the connection (a third Ctrl-C may)."""
        if slot.process.handles and self.scheduler.current.interruptions < 3:
            self.broken("left", f"{error!r} keeps a handle of {slot.process.name} open")

    def _check_told(self, slot: Slot, request: Request) -> None:
        """Whoever waits is told when the handler is done, whatever the next one takes."""
        if not request.ended or request.outcome == "interrupted" or self.killed or slot.faulty:
            return
        if request.has_arrived() == math.inf or self.bad_server:
            return  # it waits until all of its message is read, or a server of our own reads slowly
        ended, jumped = request.ended
        took = request.told - ended - (self.scheduler.jumped - jumped)
        # After Ctrl-C the server gives its clients half a second.
        if took > TOLD_SECONDS + (0.5 if self.scheduler.tasks[0].interruptions else 0.0):
            self.broken("told", f"{request} was told {took:.3f} s after the handler's end")

    def check_error(self, error: BaseException) -> None:
        """Windows' "not ended yet" and "cancelled" are nothing that a caller may see."""
        if getattr(error, "winerror", 0) in (995, 996, 997):
            self.broken("exception", f"{error!r} came out")

    def _check_early(
        self, slot: Slot, request: Request, jumped: float, seconds: float | None
    ) -> None:
        took = self.scheduler.now - request.began + self.scheduler.jumped - jumped
        if took + slot.clock_step + 0.001 < (seconds or 0.0):
            self.broken("timeout", f"{request} was given up after {took:.3f} s")

    def check_ledger(self) -> None:
        """Compare what clients saw with what the handler did."""
        for request in self.requests.values():
            if self.bad_server:
                self._check_bad_server(request)
                continue
            handled = bool(request.handled)
            outcome, answer = request.outcome, request.answer
            if request.expected and outcome not in request.expected:
                self.broken("bound", f"{request} saw {outcome}, not {request.expected[0]}")
            patient = (request.timeout or 0) >= 1.0 + self.scheduler.jumped
            answered = outcome in ("success", "refused", "none") or not patient
            if request.must_be_answered and self.quiet and not answered and answer != "exit":
                self.broken("ledger", f"{request} was under way and saw {outcome}")
            has_asked = request.file or outcome != "none"
            is_answered = handled and outcome in ("success", "refused")
            if self.must_answer and has_asked and not is_answered:
                self.broken("calm", f"{request} saw {outcome}, and nothing had gone wrong")
            if outcome == "success" and not (handled and answer == "success"):
                self.broken("ledger", f"{request} saw success: {answer}, handled: {handled}")
            elif outcome == "not sent" and handled:
                self.broken("ledger", f"{request} saw 'not sent' and was carried out")
            elif outcome == "refused":
                self._check_refusal(request)
        self._check_order()
        self._check_lost()

    def _check_refusal(self, request: Request) -> None:
        """A refusal's text arrives as it was, byte for byte."""
        seen, expected = request.response, request.expected_bytes()
        if not request.handled:
            stops = self.stopping or self.scheduler.tasks[0].interruptions
            right = UNHEARD if stops else [TOO_LATE]
        elif request.answer == "success":
            right = [b"\0OK\0"]  # if only a part of it came
        elif expected in (b"", b"\0OK\0"):
            # These can't be sent. A fixed text says so.
            right = [seen] if seen.isascii() and b"OK" not in seen and len(seen) > 9 else []
            self.fixed_texts.add(seen)
            right = right if len(self.fixed_texts) == 1 else []
        else:
            right = [expected]
        # Who reads a byte at a time may see the server die in the middle of its text, or give the
        # client up when a call fails, the clock jumps, or a second Ctrl-C has it drop everybody.
        cut = self.killed or self.faulty() or self.scheduler.jumped
        cut = cut or self.scheduler.tasks[0].interruptions > 1
        whole = seen in right and seen != b"\0OK\0"
        if not whole and not (cut and any(text.startswith(seen) for text in right)):
            self.broken("ledger", f"{request} saw {seen[:80]!r}: {request.answer}")

    def _check_lost(self) -> None:
        """Whoever has sent a request is told its end; one Ctrl-C may cost one client that.

        In the handler, or where the server waits, it costs nobody that.
        """
        main = self.scheduler.tasks[0]
        interruptions = main.interruptions
        if self.killed or self.faulty() or self.scheduler.jumped or self.bad_server:
            return
        if interruptions > 1:
            return
        lost = [
            str(request)
            for request in self.requests.values()
            if request.outcome == "unknown"
            and not request.timed_out
            and request.answer != "exit"
            and request.has_arrived() < math.inf
            and not (request.handled and interruptions)
        ]
        at_rest = main.interrupted_in.startswith(("sleep", "WaitForSingleObject"))
        if len(lost) > (0 if at_rest else interruptions):
            self.broken("ledger", f"{' and '.join(lost)} saw nothing, Ctrl-C: {interruptions}")

    def _check_bad_server(self, request: Request) -> None:
        """Compare what a client saw with what a server has answered that isn't vmshim's."""
        outcome, answer = request.outcome, request.answer
        cut_short = answer == "tail" and self.killed  # before it could send the tail
        if outcome == "success" and not (request.handled and answer == "success") and not cut_short:
            self.broken("ledger", f"{request} saw success of {answer}")
        if outcome == "not sent" and request.handled:
            self.broken("ledger", f"{request} saw 'not sent' and was carried out")
        refusal = f"refused {request.id}".encode()
        texts = {"tail": b"\0OK\0x", "truncate": b"\0OK", "refuse": refusal}
        if outcome == "refused" and not self.killed and request.response != texts.get(answer):
            self.broken("ledger", f"{request} saw {request.response!r} of {answer}")
        self._check_in_line(request)
        may_be_cut = (request.timeout or 0.0) < 1.0 or outcome == "interrupted"
        if request.must_be_refused and self.quiet and not may_be_cut and outcome != "refused":
            self.broken("ledger", f"{request} was refused early and saw {outcome}")

    def _check_in_line(self, request: Request) -> None:
        """Whoever timed out while not all was read is told "not sent", where that is sure."""
        write = request.write
        if write is None or write.status != CANCELLED or self.faulty():
            return
        sure = not request.fills_a_buffer()
        if request.outcome not in ("not sent" if sure else "unknown", "interrupted", "none"):
            self.broken("in line", f"{request} saw {request.outcome}, sure: {sure}")

    def _check_order(self) -> None:
        """Who had sent everything before another one began is handled first."""
        late = self.scheduler.jumped
        handled = [self.requests[id_] for id_ in self.order]
        for place, request in enumerate(handled):
            for later in handled[place + 1 :]:
                if later.has_arrived() + 0.005 + late < request.began and not later.goes_on:
                    self.broken("order", f"{request} was handled before {later}")


def decisions_for(seed: int) -> Decisions:
    """Draw how a run is scheduled."""
    draw = random.Random(seed ^ 0x5EED)
    return Decisions(
        seed,
        pct=draw.random() < 0.4,
        fault_rate=draw.choice((0.0, 0.003, 0.02, 0.1)),
        late_rate=draw.choice((0.0, 0.0, 0.02, 0.2, 0.6)),
    )
