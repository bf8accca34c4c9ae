"""What the runs are about: vmshim's server and its clients, and peers on the bare kernel.

`SCENARIOS` at the end says how often each is drawn.
"""

from __future__ import annotations

import ctypes
import random
import traceback
from typing import Any, Callable, NamedTuple

from simulation.environment import DOCUMENTED_ERRORS, Slot, start_thread
from simulation.fibers import GreenletExit
from simulation.kernel import CONNECTED, File, Instance, Process
from simulation.rules import PATH, STOP_SECONDS, TOLERANCE, Request, Run
from simulation.scheduler import STEP, Task

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
            self.run.end_process(self.process)

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
        buffer = (ctypes.c_char * size)()
        count = Number()
        if not self.call("ReadFile", handle, buffer, size, count, None):
            return b""
        return ctypes.string_at(buffer, count.value)

    def close(self, handle: int) -> None:
        """Close."""
        self.call("CloseHandle", handle)


class Number:
    """Where the kernel stores a number."""

    value = 0


class _Plan(NamedTuple):
    """How a peer behaves."""

    name: str
    behave: Callable[[Peer, random.Random, Request], None]


def _silent(peer: Peer, draw: random.Random, request: Request) -> None:
    handle = peer.open(1.0)
    if handle:
        _hold(peer, handle, draw.choice((0.01, 0.5, 3.0)), peer.world.now, 2)


def _hold(peer: Peer, handle: int, seconds: float, since: float, steps: int) -> None:
    """Do nothing for a while; a server cuts such a client off after its time for some steps."""
    limit = peer.run.cut_off_after
    end = peer.world.now + seconds
    if limit is not None and since + steps * limit + TOLERANCE < end:
        jumped = peer.world.jumped
        peer.sleep(since + steps * limit + TOLERANCE - peer.world.now)
        peer.sleep(peer.world.jumped - jumped)
        _check_cut_off(peer, handle)
    peer.sleep(end - peer.world.now)


def _check_cut_off(peer: Peer, handle: int) -> None:
    run = peer.run
    file = peer.process.handles.get(handle)
    is_kept = isinstance(file, File) and file.instance.server is not None
    calm = not (run.stopping or run.killed or run.scheduler.interruptions)
    calm = calm and run.scheduler.jumped < TOLERANCE
    if is_kept and calm and not run.faulty():
        run.broken("silence", f"{peer.process.name} was not cut off in time")


def _instant(peer: Peer, draw: random.Random, request: Request) -> None:
    for _ in range(draw.randrange(1, 6)):
        handle = peer.open(0.2)
        if handle:
            peer.close(handle)


def _half(peer: Peer, draw: random.Random, request: Request) -> None:
    handle = peer.open(1.0)
    if handle:
        since = peer.world.now
        peer.write(handle, b'{"ID":"half')
        _hold(peer, handle, draw.choice((0.0, 0.3, 3.0)), since, 2)


def _garbage(peer: Peer, draw: random.Random, request: Request) -> None:
    handle = peer.open(1.0)
    if handle:
        peer.write(handle, draw.choice((b"\xff\xfe", b"[1]", b"{}", b"\0", b"GET / HTTP/1.0\r\n")))
        while peer.read(handle, 100):
            pass


def _deaf(peer: Peer, draw: random.Random, request: Request) -> None:
    handle = peer.open(1.0)
    if handle:
        _ask_deafly(peer, handle, request, draw.choice((0.01, 0.5, 3.0)))


def _sleeper(peer: Peer, draw: random.Random, request: Request) -> None:
    """Be silent for a while, then ask, and don't read the answer."""
    handle = peer.open(1.0)
    if handle:
        peer.sleep(draw.choice((0.05, 0.4, 0.8)))
        if draw.random() < 0.5:
            peer.write(handle, b"[1]")
            peer.sleep(3.0)
        else:
            _ask_deafly(peer, handle, request, 2.0)


def _ask_deafly(peer: Peer, handle: int, request: Request, seconds: float) -> None:
    peer.write(handle, _message(request))
    end = peer.world.now + seconds
    peer.sleep(min(seconds, 0.05))
    if request.handled:
        since = request.handled[0] + request.seconds
        _hold(peer, handle, max(0.0, end - peer.world.now), since, 1)


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
    _Plan("sleeper", _sleeper),
]


_SILENT = [plan for plan in PEERS if plan.name in ("silent", "half", "sleeper")]


# ---- Servers on the bare kernel -----------------------------------------------------------------


class BadServer(Peer):
    """A server that isn't vmshim's, and mostly not a good one."""

    def __init__(self, run: Run, name: str, behave: Callable[[BadServer, int], None]) -> None:
        super().__init__(run, name)
        self.behave = behave
        self.quotas = (0, 0)
        self.seconds = 0.0

    def serve(self, times: int) -> None:
        """Take some clients, one after the other."""
        for _ in range(times):
            handle = self.call(
                "CreateNamedPipeW", PATH, 3, 4, 255, self.quotas[0], self.quotas[1], 0, None
            )
            if handle > 2**31:
                return
            self.call("ConnectNamedPipe", handle, None)
            self.behave(self, handle)
            self.close(handle)

    def take_request(self, handle: int) -> Any:
        """Read one request to its end; return its place in the ledger, or None."""
        received = b""
        while b"}" not in received:
            data = self.read(handle, 100)
            if not data:
                return None
            received += data
        id_ = received.decode().split('"')[3]
        return self.run.requests.get(id_)

    def succeed(self, handle: int) -> None:
        """Answer as the reference does, and wait until the client has gone."""
        if self.write(handle, b"\0OK\0"):
            self.call("FlushFileBuffers", handle)
            self.write(handle, b"")
            while self.read(handle, 100):
                pass


def _good(server: BadServer, handle: int) -> None:
    request = server.take_request(handle)
    if request:
        request.handled.append(server.world.now)
        request.answer = "success"
        server.sleep(server.seconds)
        server.succeed(handle)


def _refuse(server: BadServer, handle: int) -> None:
    request = server.take_request(handle)
    if request:
        request.answer = "refuse"
        request.handled.append(server.world.now)
        server.write(handle, b"refused " + request.id.encode())
        server.call("FlushFileBuffers", handle)


def _refuse_early(server: BadServer, handle: int) -> None:
    """Refuse before the request is read, where there is room for the text."""
    data = server.read(handle, 12)
    if len(data) == 12:
        request = server.run.requests[data.decode().split('"')[3]]
        request.answer = "refuse"
        request.handled.append(server.world.now)
        request.must_be_refused = server.quotas[0] > 0
        server.write(handle, b"refused " + request.id.encode())


def _drip(server: BadServer, handle: int) -> None:
    request = server.take_request(handle)
    if request:
        request.answer = "success"
        request.handled.append(server.world.now)
        for byte in b"\0OK":
            server.write(handle, bytes((byte,)))
            server.sleep(server.seconds)
        server.write(handle, b"\0")


def _tail(server: BadServer, handle: int) -> None:
    request = server.take_request(handle)
    if request:
        request.answer = "tail"
        server.write(handle, b"\0OK\0")
        server.write(handle, b"x")


def _truncate(server: BadServer, handle: int) -> None:
    request = server.take_request(handle)
    if request:
        request.answer = "truncate"
        server.write(handle, b"\0OK")


def _empty(server: BadServer, handle: int) -> None:
    if server.take_request(handle):
        server.sleep(server.seconds)


def _zero(server: BadServer, handle: int) -> None:
    if server.take_request(handle):
        server.write(handle, b"")
        server.sleep(server.seconds)


def _mute(server: BadServer, handle: int) -> None:
    if server.take_request(handle):
        while server.read(handle, 100):
            pass


def _blind(server: BadServer, handle: int) -> None:
    server.sleep(3.0 + server.seconds)


def _cut(server: BadServer, handle: int) -> None:
    if server.take_request(handle):
        server.write(handle, b"refused")
        server.call("DisconnectNamedPipe", handle)


def _keep(server: BadServer, handle: int) -> None:
    """Succeed, but never come to the end."""
    request = server.take_request(handle)
    if request:
        request.answer = "success"
        request.handled.append(server.world.now)
        server.write(handle, b"\0OK\0")
        while server.read(handle, 100):
            pass


BAD_SERVERS: list[Callable[[BadServer, int], None]] = [
    _good,
    _refuse,
    _refuse_early,
    _drip,
    _tail,
    _truncate,
    _empty,
    _zero,
    _mute,
    _blind,
    _cut,
    _keep,
]

# ---- The scenarios ------------------------------------------------------------------------------


def exchange(run: Run) -> None:
    """One to three of vmshim's clients and a server that isn't vmshim's."""
    draw = run.random
    run.bad_server = True
    behave = draw.choice(BAD_SERVERS)
    server = BadServer(run, behave.__name__.strip("_"), behave)
    server.quotas = (draw.choice((0, 4096)), draw.choice((0, 0, 4096)))
    server.seconds = draw.choice((0.0, 0.0, 0.005, 0.05, 0.1))
    count = draw.choice((1, 1, 2, 3))
    server.start(lambda: server.serve(2 * count))
    for number in range(count):
        _add_client(run, number)
    _end_when_done(run, server.process)
    _add_faults(run)
    # Where nothing goes wrong, the text of a refusal that came early has to be seen.
    run.quiet = _is_quiet(run)


def _end_when_done(run: Run, process: Process) -> None:
    """End a server's process when there are no clients any more."""
    clients = [task for task in run.scheduler.tasks if task.is_main]

    def watch() -> None:
        while any(not task.ended for task in clients):
            run.scheduler.sleep(0.05)
        run.end_process(process)

    run.scheduler.spawn(Process("watch"), "watch", watch)


def calm(run: Run) -> None:
    """Nothing goes wrong, only the order is random: each request must be answered."""
    draw = run.random
    slot = run.new_slot("server")
    server = ServerProcess(run, slot)
    server.request_timeout = draw.choice((None, 10.0))
    server.stop_by, server.stop_when, server.serve_twice = "shutdown", "idle", False
    run.main(slot, server.main)
    for number in range(draw.randrange(2, 7)):
        _add_client(run, number, draw.choice((-1.0, 0.001, 0.001, 0.05)))
    for request in run.requests.values():
        request.connect_timeout = request.timeout = 10.0
    run.must_answer = True


def full(run: Run) -> None:
    """One request is handled and one waits: others see busy."""
    slot = run.new_slot("server")
    server = ServerProcess(run, slot)
    server.max_clients = 64
    server.stop_by, server.stop_when, server.serve_twice = "shutdown", "idle", False
    run.main(slot, server.main)
    for number in range(5):
        _add_client(run, number, 0.03 * (number + 1))
    for place, request in enumerate(run.requests.values()):
        request.connect_timeout, request.timeout = 0.0, 10.0
        request.seconds = 0.5
        request.expected = ("success", "refused") if place < 2 else ("not sent",)


def silence(run: Run) -> None:
    """Silent clients delay an honest one by no more than 10 ms."""
    draw = run.random
    slot = run.new_slot("server")
    server = ServerProcess(run, slot)
    server.request_timeout = draw.choice((None, 1.0, 1.0, 10.0))
    server.max_clients = 64
    server.stop_by, server.stop_when, server.serve_twice = "shutdown", "idle", False
    run.main(slot, server.main)
    for number in range(draw.randrange(2, 6)):
        plan = draw.choice(_SILENT)
        peer = Peer(run, f"{plan.name}-{number}")
        peer.start(_peer_body(peer, plan, draw.random(), run.new_request(f"r{number}"), 0.001))
    _add_client(run, 0)
    for request in run.requests.values():
        request.connect_timeout = request.timeout = 5.0
        request.seconds, request.answer = 0.0, "success"
    run.honest_limit = 0.010


class Plumbing:
    """A Pipe that several threads use at a time, with a peer at the other end."""

    def __init__(self, run: Run) -> None:
        draw = run.random
        self.run = run
        self.slot = run.new_slot("user")
        self.peer = BadServer(run, "peer", self.answer)
        self.peer.quotas = (draw.choice((0, 3, 4096)), draw.choice((0, 3, 4096)))
        self.sent = [bytes((65 + n,)) * draw.randrange(0, 9) for n in range(draw.randrange(0, 5))]
        self.written = [bytes((97 + n,)) * draw.randrange(1, 9) for n in range(3)]
        self.peer_reads = draw.choice((0, 1, 3, 100))
        self.peer_waits = draw.choice((0.0, 0.0, 0.05, 0.3, 3.0))
        ends = ("close", "cancel", "deadline", "close_write", "close_write under close")
        self.ends_by = draw.choice(ends)
        self.deadline = draw.choice((0.0, 0.05, 0.3, None))
        self.pause = draw.choice((0.0, 0.0, 0.001, 0.1))
        if self.ends_by == "close_write under close":
            # What is written fits, but is not read: the flush can only be cancelled.
            self.peer.quotas = (0, 4096)
            self.peer_reads, self.peer_waits = 0, 3.0
        self.received = b""
        self.arrived = b""
        self.threads: list[Task] = []

    def answer(self, peer: BadServer, handle: int) -> None:
        """What the peer does: read some, write some, wait, close."""

        def read() -> None:
            for _ in range(self.peer_reads):
                data = peer.read(handle, 4)
                self.arrived += data
                if not data:
                    break

        reader = peer.world.spawn(peer.process, "reads", read)
        for piece in self.sent:
            if not peer.write(handle, piece):
                break
        peer.sleep(self.peer_waits)
        give_up = peer.world.now + 1.0
        while not reader.ended and peer.world.now < give_up:
            peer.sleep(0.01)

    def main(self) -> None:
        """Dial, have threads read and write, end it all in one of several ways."""
        module = self.slot.module.__dict__
        pipe = None
        try:
            pipe = module["dial_pipe"](PATH, timeout=self.deadline)
            self._start(pipe.read, 3)
            self._start_writing(pipe)
            self.run.scheduler.sleep(self.pause)
            if self.ends_by == "cancel":
                pipe.cancel()
            elif self.ends_by == "close_write":
                pipe.deadline = self.run.scheduler.now + 0.5
                pipe.close_write()
            elif self.ends_by == "close_write under close":
                self._spawn(pipe.close_write)
                self.run.scheduler.sleep(self.pause)
        except KeyboardInterrupt:
            pass
        except module["VMShimError"] as error:
            self.run.check_error(error)
        except ValueError as error:
            if "closed" not in str(error):
                self.run.broken("exception", f"a pipe's user got {error!r}")
        except GreenletExit:
            raise
        except BaseException as error:
            if not (isinstance(error, RuntimeError) and self.slot.faulty):
                self.run.broken("exception", f"a pipe's user got {error!r}")
        self._close(pipe)
        self._check(pipe)
        self.run.kernel.end_process(self.slot.process)

    def _close(self, pipe: Any) -> None:
        if pipe is None:
            return
        began = self.run.scheduler.now
        jumped = self.run.scheduler.jumped
        for _ in range(4):
            try:
                pipe.close()
                break
            except KeyboardInterrupt:
                pass
        took = self.run.scheduler.now - began - (self.run.scheduler.jumped - jumped)
        if took > 0.5:
            self.run.broken("timeout", f"close() took {took:.3f} s")
        # Another thread may just have begun something; it sees the end within a slice.
        self.run.scheduler.sleep(0.15 + self.run.scheduler.jumped - jumped)
        for operation in self.slot.process.operations:
            self.run.broken("left", f"{operation.kind} is pending after close()")

    def _check(self, pipe: Any) -> None:
        scheduler = self.run.scheduler
        give_up = scheduler.now + 1.0
        while any(not task.ended for task in self.threads) and scheduler.now < give_up:
            scheduler.sleep(0.05)
        self.threads.clear()
        scheduler.sleep(0.02)
        self.run.check_clean(self.slot, "after its pipe is closed")
        whole = b"".join(self.sent)
        if not whole.startswith(self.received):
            self.run.broken("data", f"read {self.received!r} of {whole!r}")
        whole = b"".join(self.written)
        if not whole.startswith(self.arrived):
            self.run.broken("data", f"{self.arrived!r} arrived of {whole!r}")

    def _start(self, read: Any, size: int) -> None:
        def body() -> None:
            while True:
                data = read(size)
                self.received += data
                if not data:
                    return

        self._spawn(body)

    def _start_writing(self, pipe: Any) -> None:
        def body() -> None:
            for piece in self.written:
                pipe.write(piece)

        self._spawn(body)

    def _spawn(self, body: Callable[[], None]) -> None:
        module = self.slot.module.__dict__

        def guarded() -> None:
            try:
                body()
            except module["VMShimError"] as error:
                self.run.check_error(error)
            except ValueError as error:
                if "closed" not in str(error):
                    self.run.broken("exception", f"a pipe's user got {error!r}")
            except RuntimeError as error:
                if not self.slot.faulty:
                    self.run.broken("exception", f"a pipe's user got {error!r}")

        self.threads.append(start_thread(self.run.kernel, self.slot.process, "thread", guarded))


def plumbing(run: Run) -> None:
    """A Pipe in several threads."""
    user = Plumbing(run)
    user.peer.start(lambda: user.peer.serve(1))
    slot = user.slot

    def main() -> None:
        give_up = run.scheduler.now + 0.1
        while "VMSHIM-SIMULATED" not in run.kernel.names and run.scheduler.now < give_up:
            run.scheduler.sleep(0.001)
        user.main()

    run.main(slot, main)
    _end_when_done(run, user.peer.process)
    _add_faults(run)


def rivals(run: Run) -> None:
    """Two servers want the same name: Windows lets the first have it."""
    draw = run.random
    slot = run.new_slot("server")
    server = ServerProcess(run, slot)
    server.stop_by, server.stop_when, server.serve_twice = "shutdown", "idle", False
    server.has_rival = True
    run.main(slot, server.main)
    other = run.new_slot("rival")
    start = draw.choice((0.0, 0.0, 0.001, 0.1))

    def rival() -> None:
        module = other.module.__dict__
        if start:
            run.scheduler.sleep(start)
        try:
            second = module["VMShimServer"](PATH, print)
            if not run.scheduler.tasks[0].ended and server.server is not None:
                run.broken("name", "two servers have the same name")
            second.close()
            second = None
        except module["PipeAccessError"]:
            pass
        except GreenletExit:
            raise
        except BaseException as error:
            run.broken("exception", f"the rival got {error!r}")
        run.check_clean(other, "after a rival's end")
        run.kernel.end_process(other.process)

    run.peers.append(run.main(other, rival))
    _add_client(run, 0)


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
            start = draw.choice((0.0, 0.0, 0.001, 0.02, 0.3))
            peer.start(_peer_body(peer, plan, draw.random(), request, start))
    if draw.random() < 0.05:
        draw.choice([*run.requests.values()]).answer = "exit"
    _add_faults(run)
    run.quiet = _is_quiet(run)


def _is_quiet(run: Run) -> bool:
    """Tell whether nobody dies or is interrupted, and no call fails."""
    interrupted = any(task.interrupts for task in run.scheduler.tasks)
    return not run.scheduler.actions and not run.faulty() and not interrupted


def _peer_body(
    peer: Peer, plan: _Plan, seed: float, request: Request, start: float
) -> Callable[[], None]:
    def body() -> None:
        if start:
            peer.sleep(start)
        plan.behave(peer, random.Random(seed), request)

    return body


def _add_client(run: Run, number: int, start: float | None = None) -> None:
    """Add a client; without a start it is drawn, and if that is below 0 it is as soon as can be."""
    draw = run.random
    slot = run.new_slot(f"client-{number}")
    turns = 1 if start is not None and start > 0 else draw.choice((1, 1, 2))
    requests = [run.new_request(f"c{number}.{turn}") for turn in range(turns)]
    seconds = draw.choice((0.0, 0.0, 0.0, 0.001, 0.01, 0.1)) if start is None else start

    def main() -> None:
        if seconds > 0:
            run.scheduler.sleep(seconds)
        while seconds < 0 and "VMSHIM-SIMULATED" not in run.kernel.names:
            run.scheduler.sleep(STEP)
        for request in requests:
            run.issue(slot, request)
        run.check_clean(slot, "after its requests")
        run.kernel.end_process(slot.process)

    task = run.main(slot, main)
    run.peers.append(task)


def _ignore(process: Process, instance: Instance) -> None:
    """Nobody counts the clients any more."""


_SERVING = frozenset(("serve_forever", "run_handler", "_get", "_call_handler", "_wake"))
# Where a Ctrl-C, mostly the second, may leave something for close() to do.
_CLEANING_UP = frozenset(("join", "leave_handler", "stop", "shutdown", "close", "__exit__"))


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
        self.has_rival = False
        self.early = 0
        self.admins: list[Task] = []

    def main(self) -> None:
        module = self.slot.module.__dict__
        self.run.cut_off_after = self.request_timeout
        try:
            self._serve(module)
        except KeyboardInterrupt:
            self._close()
        except module["PipeOpenError"] as error:
            lost = self.has_rival and isinstance(error, module["PipeAccessError"])
            if not self.slot.faulty and not lost:
                self.run.broken("exception", f"the server got {error!r}")
            self._close()
        except ValueError as error:
            if self.server is None or not self.server._closed:
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
        if not self.slot.faulty and not self.has_rival:
            self._begin_again(module)
        self.run.kernel.end_process(self.slot.process)

    def _begin_again(self, module: dict[str, Any]) -> None:
        """The name is free for the next server."""
        self.run.kernel.on_open = _ignore
        self.run.scheduler.current.interrupts = []
        try:
            module["VMShimServer"](PATH, self._handler).close()
        except OSError as error:
            self.run.broken("name", f"the next server got {error!r}")
        self.run.check_clean(self.slot, "after the next server's end")

    def _serve(self, module: dict[str, Any]) -> None:
        self.server = module["VMShimServer"](
            PATH,
            self._handler,
            request_timeout=self.request_timeout,
            max_clients=self.max_clients,
        )
        self._start_admin(self._admin)
        self.early = self._count_clients()
        self.run.kernel.on_open = self._somebody_opens
        with self.server:
            try:
                self.server.serve_forever()
            except KeyboardInterrupt as error:
                self._check_interrupted(error)
                raise
            self._check_threads()
            if self.server._closed and "VMSHIM-SIMULATED" in self.run.kernel.names:
                self.run.broken("name", "a server that is closed still has its name")
            if self.serve_twice and not self.server._closed:
                self.server.serve_forever()

    def _count_clients(self) -> int:
        """Return how many clients of other processes are connected."""
        name = self.run.kernel.names.get("VMSHIM-SIMULATED")
        states = [i.state for i in name.instances] if name else []
        return states.count(CONNECTED)

    def _somebody_opens(self, process: Process, instance: Instance) -> None:
        if process is self.slot.process or self.slot.process.dead:
            return
        count = self._count_clients()
        if count > self.max_clients + self.early:
            self.run.broken("bound", f"{count} clients at a time, not {self.max_clients}")

    def _start_admin(self, function: Callable[[], None]) -> None:
        task = start_thread(self.run.kernel, self.slot.process, "admin", function)
        self.admins.append(task)

    def _check_interrupted(self, error: KeyboardInterrupt) -> None:
        """One Ctrl-C ends serve_forever() in time, and with it the other thread."""
        names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
        vmshims = [name for name in names if name in _SERVING]
        if not vmshims or vmshims[-1] == "serve_forever" or _CLEANING_UP.intersection(names):
            return
        scheduler = self.run.scheduler
        took = scheduler.now - scheduler.current.interrupted_at
        if took > STOP_SECONDS + scheduler.jumped + TOLERANCE:
            self.run.broken("timeout", f"serve_forever() ended {took:.3f} s after Ctrl-C")
        self._check_threads()

    def _check_threads(self) -> None:
        """When serve_forever() has returned, its thread has ended, or is at its last line."""
        self.run.scheduler.note("serve_forever() has returned")
        self.run.scheduler.sleep(0.01)
        for task in self.run.scheduler.tasks:
            if task.process is self.slot.process and task.name == "thread" and not task.ended:
                self.run.broken("left", "serve_forever() has returned before its thread")

    def _handler(self, request: Any) -> None:
        if self.stop_by == "handler" and self.run.random.random() < 0.3:
            self.run.stopping = True
            self.run.requests[request.id].must_be_answered = True
            self.server.close()
        self.run.handle(self.slot, request)

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
            give_up = scheduler.now + 12.0
            while any(not task.ended for task in self.run.peers) and scheduler.now < give_up:
                scheduler.sleep(0.05)
        if self.stop_by == "interrupt":
            self._press_ctrl_c()
        while self.server is not None:
            self._stop_once()
            scheduler.sleep(0.3)

    def _press_ctrl_c(self) -> None:
        """Have the main thread interrupted soon, and give it time."""
        main = self.run.scheduler.tasks[0]
        if "interrupts" not in self.run.without and not main.interrupts:
            self.run.stopping = True
            main.interrupts = [main.points + self.run.random.randrange(1, 30)]
            self.run.quiet = False
            self.run.scheduler.sleep(5.0)

    def _stop_once(self) -> None:
        self.run.stopping = True
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
    """Draw what goes wrong; Run.without names what is left out, of what is drawn all the same."""
    for name, add in FAULTS.items():
        seed = run.random.random()
        if name not in run.without:
            add(run, random.Random(seed))


def _add_interrupts(run: Run, draw: random.Random) -> None:
    """Ctrl-C in a main thread, sometimes a second one soon after."""
    if draw.random() < 0.4:
        mains = [task for task in run.scheduler.tasks if task.is_main]
        task = draw.choice(mains[:1] * 3 + mains)
        points = 12.0 if run.deep else 9.0
        first = int(2 ** (draw.random() * points))
        task.interrupts = [first]
        if draw.random() < 0.3:
            task.interrupts.append(first + int(2 ** (draw.random() * (points - 4))))


def _add_death(run: Run, draw: random.Random) -> None:
    """The death of a process."""
    if draw.random() < 0.25:
        tasks = [task for task in run.scheduler.tasks if task.name != "watch"]
        victim = draw.choice(tasks).process
        step = int(2 ** (draw.random() * 10.5))
        run.scheduler.actions[step] = lambda: run.kill(victim)


def _add_errors(run: Run, draw: random.Random) -> None:
    """Calls that fail in one process, each time that Decisions.fault() says so."""
    if draw.random() < 0.3:
        slot = draw.choice(run.slots[: run.used])
        slot.faulty = frozenset(draw.sample(_MAY_FAIL, 2))


def _add_clock(run: Run, draw: random.Random) -> None:
    """A time.monotonic() that moves in steps, as before Python 3.13 on Windows, and jumps."""
    if draw.random() < 0.2:
        for slot in run.slots[: run.used]:
            slot.clock_step = 0.0156
    if draw.random() < 0.05:
        seconds = draw.random() * 3
        run.scheduler.later(draw.random() * 0.1, lambda: run.scheduler.jump(seconds))


_MAY_FAIL = (*DOCUMENTED_ERRORS, "start_new_thread")
FAULTS = {
    "interrupts": _add_interrupts,
    "death": _add_death,
    "errors": _add_errors,
    "clock": _add_clock,
}


SCENARIOS: list[tuple[float, Callable[[Run], None]]] = [
    (0.60, service),
    (0.70, calm),
    (0.85, exchange),
    (0.95, plumbing),
    (0.975, silence),
    (0.985, full),
    (1.00, rivals),
]


def scenario_for(seed: int) -> Callable[[Run], None]:
    """Return the scenario of a seed."""
    drawn = random.Random(seed ^ 0xFACE).random()
    return next(scenario for share, scenario in SCENARIOS if drawn < share)
