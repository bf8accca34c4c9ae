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

import gc
import random
from typing import Any, Callable, Dict, List, NamedTuple

from greenlet import GreenletExit

from simulation.environment import Slot, start_thread
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
        self.message = ""
        self.handled: List[float] = []


class Run:
    """One run: the world, the ledger, and the processes."""

    def __init__(
        self, slots: List[Slot], seed: int, decisions: Decisions, *, keep_history: bool = False
    ) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.scheduler = Scheduler(decisions, keep_history=keep_history)
        self.kernel = Kernel(self.scheduler)
        self.slots = slots
        self.used = 0
        self.requests: Dict[str, Request] = {}
        self.peers: List[Task] = []
        self.handling = 0
        self.order: List[str] = []
        self.killed = False

    # Processes.

    def new_slot(self, name: str) -> Slot:
        """Start a process that runs vmshim.py."""
        slot = self.slots[self.used]
        self.used += 1
        process = Process(name)
        slot.begin(self.scheduler, self.kernel, process)
        return slot

    def main(self, slot: Slot, function: Callable[[], None]) -> Task:
        """Start a process' main thread, the one that Ctrl-C hits."""
        task = start_thread(self.kernel, slot.process, "main", function)
        task.is_main = True
        return task

    def kill(self, process: Process) -> None:
        """End a process, whatever it does."""
        if not process.dead:
            self.killed = True
            self.scheduler.note(f"*** {process.name} is killed")
            self.kernel.end_process(process)
            self.scheduler.kill(process)

    def broken(self, rule: str, text: str) -> None:
        """Take note that a rule is broken."""
        self.scheduler.broken(rule, text)

    def check_clean(self, slot: Slot, when: str) -> None:
        """A process that is through has nothing left."""
        process = slot.process
        under_way = slot.module.__dict__["_under_way"]
        if process.handles or under_way or process.operations:
            gc.collect()
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

    def run(self, build: Callable[[Run], None]) -> List[str]:
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
        request = Request(id_, draw.choice((0.0, 0.05, 0.5, 2.0, 2.0, 10.0)), timeout)
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
        except module["OutcomeUnknownError"]:
            request.outcome = "unknown"
        except KeyboardInterrupt:
            request.outcome = "interrupted"
        except GreenletExit:
            raise
        except BaseException as error:
            self.broken("exception", f"a client got {error!r}")
        self.scheduler.note(f"{request.id}: {request.outcome} {request.message}")
        if request.timeout is not None:
            took = self.scheduler.now - request.began - (self.scheduler.jumped - jumped)
            allowed = request.connect_timeout + request.timeout + TOLERANCE
            if took > allowed:
                self.broken("timeout", f"{request.id} took {took:.3f} s, not {allowed:.3f}")

    def check_ledger(self) -> None:
        """Compare what clients saw with what the handler did."""
        for request in self.requests.values():
            handled = bool(request.handled)
            outcome, answer = request.outcome, request.answer
            if outcome == "success" and not (handled and answer == "success"):
                self.broken("ledger", f"{request.id} saw success: {answer}, handled: {handled}")
            elif outcome == "not sent" and handled:
                self.broken("ledger", f"{request.id} saw 'not sent' and was carried out")
            elif outcome == "refused":
                expected = [REFUSALS[answer] + request.id] if handled and answer in REFUSALS else []
                expected += [] if handled else UNHEARD
                # Who reads a byte at a time may see the server die in the middle of its text.
                seen = request.message
                whole = seen in expected
                if not whole and not (self.killed and any(e.startswith(seen) for e in expected)):
                    self.broken("ledger", f"{request.id} saw {seen!r}: {answer}")
        self._check_order()

    def _check_order(self) -> None:
        """Who had sent everything before another one began is handled first."""
        late = self.scheduler.jumped
        handled = [self.requests[id_] for id_ in self.order]
        for place, request in enumerate(handled):
            for later in handled[place + 1 :]:
                if later.sent and later.sent + 0.005 + late < request.began:
                    self.broken("order", f"{request.id} was handled before {later.id}")


# ---- Peers on the bare kernel -------------------------------------------------------------------


class Peer:
    """A process without vmshim: it calls the kernel, with handles that block."""

    def __init__(self, run: Run, name: str) -> None:
        self.run = run
        self.process = Process(name)
        self.kernel = run.kernel
        self.world = run.scheduler

    def start(self, behave: Callable[[], None]) -> Task:
        """Start it; its process ends with it."""

        def body() -> None:
            behave()
            self.kernel.end_process(self.process)

        task = self.world.spawn(self.process, "peer", body)
        self.run.peers.append(task)
        return task

    def call(self, name: str, *arguments: Any) -> int:
        """Call a function of the kernel."""
        self.world.point()
        result: int = getattr(self.kernel, name)(self.process, *arguments)
        self.world.note(f"{name} = {result:#x}")
        return result

    def sleep(self, seconds: float) -> None:
        """Do nothing for a while."""
        self.world.sleep(seconds)

    def open(self, seconds: float) -> int:
        """Open the pipe; 0 if it stays busy or isn't there."""
        give_up = self.world.now + seconds
        while True:
            handle = self.call("CreateFileW", PATH, 0xC0000000, 0, None, 3, 0, None)
            if handle < 2**31:
                return handle
            if self.world.current.last_error != 231 or self.world.now >= give_up:
                return 0
            self.call("WaitNamedPipeW", PATH, 50)

    def write(self, handle: int, data: bytes) -> bool:
        """Write, and wait until it is read."""
        return bool(self.call("WriteFile", handle, data, len(data), None, None))

    def read(self, handle: int, size: int) -> bytes:
        """Read; b"" at the end and at an error."""
        buffer = _buffers(size)()
        count = Number()
        if not self.call("ReadFile", handle, buffer, size, count, None):
            return b""
        return bytes(buffer[: count.value])

    def close(self, handle: int) -> None:
        """Close."""
        self.call("CloseHandle", handle)


class Number:
    """Where the kernel stores a number."""

    value = 0


def _buffers(size: int) -> Any:
    import ctypes

    return ctypes.c_char * size


class _Plan(NamedTuple):
    """How a peer behaves."""

    name: str
    behave: Callable[[Peer, random.Random, Request], None]


def _silent(peer: Peer, draw: random.Random, request: Request) -> None:
    handle = peer.open(1.0)
    if handle:
        peer.sleep(draw.choice((0.01, 0.5, 3.0)))


def _instant(peer: Peer, draw: random.Random, request: Request) -> None:
    for _ in range(draw.randrange(1, 6)):
        handle = peer.open(0.2)
        if handle:
            peer.close(handle)


def _half(peer: Peer, draw: random.Random, request: Request) -> None:
    handle = peer.open(1.0)
    if handle:
        peer.write(handle, b'{"ID":"half')
        peer.sleep(draw.choice((0.0, 0.3, 3.0)))


def _garbage(peer: Peer, draw: random.Random, request: Request) -> None:
    handle = peer.open(1.0)
    if handle:
        peer.write(handle, draw.choice((b"\xff\xfe", b"[1]", b"{}", b"\0", b"GET / HTTP/1.0\r\n")))
        while peer.read(handle, 100):
            pass


def _deaf(peer: Peer, draw: random.Random, request: Request) -> None:
    handle = peer.open(1.0)
    if handle:
        peer.write(handle, _message(request))
        peer.sleep(draw.choice((0.01, 0.5, 3.0)))


def _leaver(peer: Peer, draw: random.Random, request: Request) -> None:
    handle = peer.open(1.0)
    if handle:
        peer.write(handle, _message(request))


def _slow(peer: Peer, draw: random.Random, request: Request) -> None:
    """Write and read a byte at a time; what comes is checked."""
    handle = peer.open(1.0)
    if not handle:
        return
    request.began = peer.world.now
    for byte in _message(request):
        if not peer.write(handle, bytes((byte,))):
            return
    request.sent = peer.world.now
    _take_answer(peer, handle, request, 1)


def _flood(peer: Peer, draw: random.Random, request: Request) -> None:
    """Send more than a request; that mustn't cost it the answer."""
    handle = peer.open(1.0)
    if not handle:
        return
    if peer.write(handle, _message(request)):
        for _ in range(3):
            if not peer.write(handle, b"x" * 5000):
                break
        _take_answer(peer, handle, request, 100)


def _take_answer(peer: Peer, handle: int, request: Request, size: int) -> None:
    answer = b""
    while True:
        data = peer.read(handle, size)
        answer += data
        if not data:
            break
    if answer == b"\0OK\0":
        request.outcome = "success"
    elif answer:
        request.outcome, request.message = "refused", answer.decode()
    else:
        request.outcome = "unknown"


def _message(request: Request) -> bytes:
    return b'{"ID":"%s","Op":"sync"}\n' % request.id.encode()


PEERS = [
    _Plan("silent", _silent),
    _Plan("instant", _instant),
    _Plan("half", _half),
    _Plan("garbage", _garbage),
    _Plan("deaf", _deaf),
    _Plan("leaver", _leaver),
    _Plan("slow", _slow),
    _Plan("flood", _flood),
]


# ---- The scenarios ------------------------------------------------------------------------------


def service(run: Run) -> None:
    """A server, two to six clients of which some are hostile, and faults."""
    draw = run.random
    slot = run.new_slot("server")
    server = ServerProcess(run, slot)
    run.main(slot, server.main)
    count = draw.randrange(2, 7)
    honest = max(1, count - draw.randrange(0, 4))
    for number in range(count):
        if number < honest:
            _add_client(run, number)
        else:
            plan = draw.choice(PEERS)
            peer = Peer(run, f"{plan.name}-{number}")
            request = run.new_request(f"r{number}")
            start = draw.choice((0.0, 0.0, 0.001, 0.02))
            peer.start(_peer_body(peer, plan, draw.random(), request, start))
    _add_faults(run)


def _peer_body(
    peer: Peer, plan: _Plan, seed: float, request: Request, start: float
) -> Callable[[], None]:
    def body() -> None:
        if start:
            peer.sleep(start)
        plan.behave(peer, random.Random(seed), request)

    return body


def _add_client(run: Run, number: int) -> None:
    draw = run.random
    slot = run.new_slot(f"client-{number}")
    requests = [run.new_request(f"c{number}.{turn}") for turn in range(draw.choice((1, 1, 2)))]
    start = draw.choice((0.0, 0.0, 0.0, 0.001, 0.01, 0.1))

    def main() -> None:
        if start:
            run.scheduler.sleep(start)
        for request in requests:
            run.issue(slot, request)
        run.check_clean(slot, "after its requests")
        run.kernel.end_process(slot.process)

    task = run.main(slot, main)
    run.peers.append(task)


class ServerProcess:
    """A process that serves, is told to stop in one of several ways, and must leave nothing."""

    def __init__(self, run: Run, slot: Slot) -> None:
        draw = run.random
        self.run = run
        self.slot = slot
        self.request_timeout = draw.choice((None, 0.1, 1.0, 10.0))
        self.max_clients = draw.choice((1, 2, 64, 64))
        self.stop_by = draw.choice(("shutdown", "close", "two", "handler", "interrupt"))
        self.stop_when = draw.choice(("idle", "idle", "idle", "early", "soon"))
        self.serve_twice = draw.random() < 0.2
        self.server: Any = None
        self.admins: List[Task] = []

    def main(self) -> None:
        module = self.slot.module.__dict__
        try:
            self._serve(module)
        except KeyboardInterrupt:
            self._close()
        except module["PipeOpenError"] as error:
            if not self.slot.faulty:
                self.run.broken("exception", f"the server got {error!r}")
            self._close()
        except (RuntimeError, OSError) as error:
            if not self.slot.faulty:
                self.run.broken("exception", f"the server got {error!r}")
            self._close()
        except SystemExit:
            self._close()
        self.server = None
        for task in self.admins:
            while not task.ended:
                self.run.scheduler.sleep(0.05)
        self._check()
        self.run.kernel.end_process(self.slot.process)

    def _serve(self, module: Dict[str, Any]) -> None:
        self.server = module["VMShimServer"](
            PATH,
            self._handler,
            request_timeout=self.request_timeout,
            max_clients=self.max_clients,
        )
        self._start_admin(self._admin)
        with self.server:
            self.server.serve_forever()
            if self.serve_twice and not self.server._closed:
                self.server.serve_forever()

    def _start_admin(self, function: Callable[[], None]) -> None:
        task = start_thread(self.run.kernel, self.slot.process, "admin", function)
        self.admins.append(task)

    def _handler(self, request: Any) -> None:
        self.run.handle(self.slot, request)
        if self.stop_by == "handler" and self.run.random.random() < 0.3:
            self.server.close()

    def _close(self) -> None:
        """A close() that follows always finishes what was left."""
        for _ in range(4):
            try:
                if self.server is not None:
                    began = self.run.scheduler.now
                    self.server.close()
                    self._check_time("close()", began, 0.0)
                return
            except KeyboardInterrupt:
                pass

    def _admin(self) -> None:
        scheduler = self.run.scheduler
        if self.stop_when == "early":
            scheduler.sleep(self.run.random.choice((0.0, 0.0, 0.001)))
        elif self.stop_when == "soon":
            scheduler.sleep(self.run.random.random() * 0.05)
        else:
            # A server without a time limit may have a client for ever.
            give_up = scheduler.now + 40.0
            while any(not task.ended for task in self.run.peers) and scheduler.now < give_up:
                scheduler.sleep(0.05)
        while self.server is not None:
            self._stop_once()
            scheduler.sleep(0.3)

    def _stop_once(self) -> None:
        server = self.server
        if self.stop_by == "two":
            self._start_admin(server.shutdown)
        began = self.run.scheduler.now
        jumped = self.run.scheduler.jumped
        if self.stop_by == "close":
            server.close()
        else:
            server.shutdown()
        self._check_time("shutdown()", began, jumped)

    def _check_time(self, what: str, began: float, jumped: float) -> None:
        took = self.run.scheduler.now - began - (self.run.scheduler.jumped - jumped)
        if took > STOP_SECONDS + TOLERANCE:
            self.run.broken("timeout", f"{what} took {took:.3f} s")

    def _check(self) -> None:
        self.run.check_clean(self.slot, "after the server's end")
        for line in self.slot.logged:
            if "given up" in line or (line.startswith("error") and not self._may_log(line)):
                self.run.broken("exception", f"the server logged {line}")

    def _may_log(self, line: str) -> bool:
        return "the handler failed" in line or bool(self.slot.faulty)


def _add_faults(run: Run) -> None:
    """Draw what goes wrong: Ctrl-C, deaths, errors, clocks."""
    draw = run.random
    used = run.slots[: run.used]
    mains = [task for task in run.scheduler.tasks if task.is_main]
    if draw.random() < 0.4:
        task = draw.choice(mains[:1] * 3 + mains)
        first = int(2 ** (draw.random() * 9))
        task.interrupts = [first]
        if draw.random() < 0.3:
            task.interrupts.append(first + 1 + int(2 ** (draw.random() * 5)))
    if draw.random() < 0.25:
        victim = draw.choice(run.scheduler.tasks).process
        step = int(2 ** (draw.random() * 10.5))
        run.scheduler.actions[step] = lambda: run.kill(victim)
    if draw.random() < 0.3:
        slot = draw.choice(used)
        names = ("CreateFileW", "CreateNamedPipeW", "CreateIoCompletionPort", "ReadFile")
        more = ("WriteFile", "ConnectNamedPipe", "WaitNamedPipeW", "start_new_thread")
        slot.faulty = frozenset(draw.sample(names + more, 2))
    if draw.random() < 0.2:
        step_size = 0.0156
        for slot in used:
            slot.clock_step = step_size
    if draw.random() < 0.05:
        run.scheduler.later(draw.random() * 0.1, lambda: run.scheduler.jump(draw.random() * 3))


def decisions_for(seed: int) -> Decisions:
    """Draw how a run is scheduled."""
    draw = random.Random(seed ^ 0x5EED)
    rate = draw.choice((0.0, 0.001, 0.01, 0.05))
    return Decisions(seed, pct=draw.random() < 0.4, fault_rate=rate)
