"""What the runs are about: vmshim's server and its clients, and peers on the bare kernel.

`SCENARIOS` at the end says how often each is drawn.
"""

from __future__ import annotations

import ctypes
import gc
import math
import random
import sys
import traceback
from typing import Any, Callable, Tuple

from simulation.environment import DOCUMENTED_ERRORS, Slot, start_thread
from simulation.fibers import GreenletExit
from simulation.kernel import CONNECTED, File, Instance, Process
from simulation.rules import PATH, STOP_SECONDS, TOLERANCE, Request, Run
from simulation.scheduler import STEP, Task

PIPE_KEY = "VMSHIM-SIMULATED"
IDLE_STOP_SECONDS = 0.03  # in which shutdown() returns if the server has no client

# ---- Peers on the bare kernel -------------------------------------------------------------------


class Peer:
    """A process without vmshim: it calls the kernel, with handles that block."""

    def __init__(self, run: Run, name: str, account: str = "administrator") -> None:
        self.run = run
        self.process = Process(name, account=account)
        self.kernel = run.kernel
        self.world = run.scheduler
        self.sleep = run.scheduler.sleep

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

    def mark(self) -> Mark:
        """Return the time, and how much of it has gone to clock and handler, which don't count."""
        return self.world.now, self.world.jumped, self.run.seconds_handled()

    def open(self, seconds: float, access: int = 0xC0000000) -> int:
        """Open the pipe; 0 if it stays busy or isn't there."""
        give_up = self.world.now + seconds
        while True:
            handle = self.call("CreateFileW", PATH, access, 0, None, 3, 0, None)
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
        count = ctypes.c_uint32()
        if not self.call("ReadFile", handle, buffer, size, count, None):
            return b""
        return ctypes.string_at(buffer, count.value)

    def close(self, handle: int) -> None:
        """Close."""
        self.call("CloseHandle", handle)


Mark = Tuple[float, float, float]


def _silent(peer: Peer, draw: random.Random, request: Request) -> None:
    handle = peer.open(1.0)
    if handle:
        _hold(peer, handle, draw.choice((0.01, 0.5, 3.0)), peer.mark(), 2)


def _hold(peer: Peer, handle: int, seconds: float, mark: Mark, steps: int) -> None:
    """Do nothing for a while; a server cuts such a client off after its time for some steps.

    The time in which a handler runs doesn't count.
    """
    world = peer.world
    limit = math.inf if peer.run.cut_off_after is None else peer.run.cut_off_after
    end = world.now + seconds
    since, jumped, handled = mark
    if since + steps * limit + TOLERANCE < end:
        since += steps * limit + TOLERANCE - handled
        while world.now < since + peer.run.seconds_handled() and not peer.run.killed:
            peer.sleep(0.05)
        peer.sleep(world.jumped - jumped)
        _check_cut_off(peer, handle)
    peer.sleep(end - world.now)


def _check_cut_off(peer: Peer, handle: int) -> None:
    run = peer.run
    file = peer.process.handles.get(handle)
    is_kept = isinstance(file, File) and file.instance.server is not None
    if is_kept and run.is_calm(0.0) and not run.stopping:
        run.broken("silence", f"{peer.process.name} was not cut off in time")


def _instant(peer: Peer, draw: random.Random, request: Request) -> None:
    for _ in range(draw.randrange(1, 6)):
        handle = peer.open(0.2)
        if handle:
            peer.close(handle)


def _half(peer: Peer, draw: random.Random, request: Request) -> None:
    handle = peer.open(1.0)
    if handle:
        mark = peer.mark()
        peer.write(handle, b'{"ID":"half')
        if draw.random() < 0.3:
            # Somebody is told why nothing came of it.
            told = peer.read(handle, 100)
            since, jumped, handled = mark
            took = peer.world.now - since - (peer.run.seconds_handled() - handled)
            limit = (peer.run.cut_off_after or math.inf) + 0.06
            calm = peer.run.is_calm(jumped) and not peer.run.stopping
            if calm and (not told or took > limit + peer.world.jumped - jumped):
                text = f"{peer.process.name} was told {told!r} after {took:.3f} s"
                peer.run.broken("too late", text)
        _hold(peer, handle, draw.choice((0.0, 0.3, 3.0)), mark, 2)


def _garbage(peer: Peer, draw: random.Random, request: Request) -> None:
    handle = peer.open(1.0)
    if handle:
        peer.write(handle, draw.choice((b"\xff\xfe", b"[1]", b"{}", b"\0", b"GET / HTTP/1.0\r\n")))
        answer = b"".join(iter(lambda: peer.read(handle, 100), b""))
        if answer == b"\0OK\0":
            peer.run.broken("ledger", f"{peer.process.name} was told of success")


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
        _hold(peer, handle, max(0.0, end - peer.world.now), peer.mark(), 1)


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
    _take_answer(peer, handle, request, 1 if len(request.expected_bytes()) < 100 else 5000)


def _punctual(peer: Peer, draw: random.Random, request: Request) -> None:
    """Ask at the last moment."""
    handle = peer.open(1.0)
    if handle:
        limit = peer.run.cut_off_after or 1.0
        peer.sleep(max(0.0, limit + draw.choice((-1e-3, -1e-4, 0.0, 1e-3, 5e-3)) * draw.random()))
        if peer.write(handle, _message(request)):
            _take_answer(peer, handle, request, 100)
            # A server that stopped meanwhile has begun to tell it so, which takes time, too; and
            # the server's clock moves in steps of 15.6 ms.
            is_ending = peer.run.stopping or peer.run.scheduler.tasks[0].interruptions > 0
            request.timed_out = is_ending and request.outcome == "unknown"


def _lingerer(peer: Peer, draw: random.Random, request: Request) -> None:
    """Take all of the answer, and don't close."""
    handle = peer.open(1.0)
    if handle and peer.write(handle, _message(request)):
        _take_answer(peer, handle, request, 5000)
        _hold(peer, handle, draw.choice((0.01, 0.5, 3.0)), peer.mark(), 1)


def _stranger(peer: Peer, draw: random.Random, request: Request) -> None:
    """Somebody who may not open the pipe, or may not make an instance of it, tries."""
    for _ in range(draw.randrange(1, 4)):
        handle = peer.open(0.0, draw.choice((0xC0000000, 0x80000000, 0x40000000, 0)))
        if handle and not peer.run.strangers_may_open:
            peer.run.broken("access", f"a {peer.process.account} has opened the pipe")
        if PIPE_KEY in peer.kernel.names:
            create = peer.kernel.CreateNamedPipeW
            if create(peer.process, PATH, 3, 4, 255, 0, 0, 0, None) < 2**31:
                peer.run.broken("access", f"a {peer.process.account} has made an instance")
        if handle:
            peer.close(handle)


def _flood(peer: Peer, draw: random.Random, request: Request) -> None:
    """Send more than a request; that mustn't cost it the answer."""
    handle = peer.open(1.0)
    if not handle:
        return
    request.goes_on = True
    tail = b"x" * draw.choice((0, 5000, 20000))  # of the same message
    if peer.write(handle, _message(request) + tail):
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
        request.outcome, request.response = "refused", answer
    else:
        request.outcome = "unknown"


def _message(request: Request) -> bytes:
    return b'{"ID":"%s","Op":"sync"}\n' % request.id.encode()


Behaviour = Callable[[Peer, random.Random, Request], None]
_SILENT: list[Behaviour] = [_silent, _half, _sleeper]
PEERS: list[Behaviour] = [*_SILENT, _instant, _garbage, _deaf, _leaver, _slow, _flood]
PEERS += [_punctual, _lingerer, _stranger]


def _add_peer(run: Run, number: int, behave: Behaviour, start: float) -> Request:
    """Add a peer; it draws what it does from a seed of its own."""
    name = behave.__name__.strip("_")
    peer = Peer(run, f"{name}-{number}")
    if behave is _stranger:
        peer.process.account = run.random.choice(("user", "anonymous"))
    seed = run.random.random()
    request = run.new_request(f"r{number}")

    def body() -> None:
        if start:
            peer.sleep(start)
        behave(peer, random.Random(seed), request)

    peer.start(body)
    return request


# ---- Servers on the bare kernel -----------------------------------------------------------------


class BadServer(Peer):
    """A server that isn't vmshim's, and mostly not a good one."""

    def __init__(self, run: Run, name: str, behave: Callable[[BadServer, int], None]) -> None:
        super().__init__(run, name)
        self.behave = behave
        # It reads as Go's json.Decoder does, to the closing brace; or a byte at a time, to the end.
        self.by_bytes = run.random.random() < 0.2
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
        """Read a request as the reference does; return its place in the ledger, or None."""
        received, capacity = b"", 0
        while (b"\n" if self.by_bytes else b"}") not in received:
            if capacity - len(received) < 512:
                capacity = 2 * capacity + 512
            data = self.read(handle, 1 if self.by_bytes else capacity - len(received))
            if not data:
                return None
            received += data
        return self.run.requests.get(received.decode().split('"')[3])


class Reference(BadServer):
    """A server like hcsshim's.

    It has one client at a time. One more is connected and waits, and its request isn't read before
    the first has closed. The buffers are 0.
    """

    def __init__(self, run: Run, name: str) -> None:
        super().__init__(run, name, _blind)
        self.line: list[int] = []
        self.tasks: list[Task] = []

    def accept(self) -> None:
        """Let one client in after the other, as long as none is in line."""
        self.tasks.append(self.world.current)
        while True:
            handle = self.call("CreateNamedPipeW", PATH, 3, 4, 255, 0, 0, 0, None)
            self.call("ConnectNamedPipe", handle, None)
            self.line.append(handle)
            self._wait_while(lambda: bool(self.line))

    def serve_all(self) -> None:
        """Serve whoever is in line."""
        self.tasks.append(self.world.spawn(self.process, "accepts", self.accept))
        self.tasks.append(self.world.current)
        while True:
            self._wait_while(lambda: not self.line)
            handle = self.line.pop()
            self._wake()
            self._serve(handle)
            self.close(handle)

    def _wait_while(self, is_so: Callable[[], bool]) -> None:
        self._wake()
        while is_so():
            self.world.block(math.inf)

    def _wake(self) -> None:
        for task in self.tasks:
            self.world.wake(task)

    def _serve(self, handle: int) -> None:
        request = self.take_request(handle)
        if request is None:
            return
        if request.handled:
            self.run.broken("once", f"{request.id} is carried out again")
        request.handled.append(self.world.now)
        self.sleep(request.seconds)
        request.ended = self.world.now, self.world.jumped
        if request.answer == "success":
            if self.write(handle, b"\0OK\0"):
                self.write(handle, b"")
                while self.read(handle, 4096):
                    pass
        else:
            self.write(handle, b"refused " + request.id.encode())


def _follow(name: str) -> Callable[[BadServer, int], None]:
    """Return what reads a request and goes through the steps of an answer."""
    answer, steps = ANSWERS[name]

    def behave(server: BadServer, handle: int) -> None:
        request = server.take_request(handle)
        if not request:
            return
        if answer:
            request.answer = answer
        if answer in ("success", "refuse"):
            request.handled.append(server.world.now)
        for step in steps:
            if step == "wait":
                server.sleep(server.seconds)
            elif step == "read":
                while server.read(handle, 100):
                    pass
            elif isinstance(step, str):
                server.call(step, handle)
            elif not server.write(handle, step.replace(b"ID", request.id.encode())):
                break

    behave.__name__ = name
    return behave


# What is in the ledger of it, and the steps. Bytes are written; `read` reads to the end.
ANSWERS: dict[str, tuple[str, list[Any]]] = {
    "good": ("success", ["wait", b"\0OK\0", "FlushFileBuffers", b"", "read"]),
    "refuse": ("refuse", [b"refused ID", "FlushFileBuffers"]),
    "drip": ("success", [b"\0", "wait", b"O", "wait", b"K", "wait", b"\0"]),
    "tail": ("tail", [b"\0OK\0", b"x"]),
    "truncate": ("truncate", [b"\0OK"]),
    "empty": ("", ["wait"]),
    "zero": ("", [b"", "wait"]),
    "mute": ("", ["read"]),
    "cut": ("", [b"refused", "DisconnectNamedPipe"]),
    "keep": ("success", [b"\0OK\0", "read"]),  # never comes to the end
}


def _refuse_early(server: BadServer, handle: int) -> None:
    """Refuse before the request is read, where there is room for the text."""
    data = server.read(handle, 12)
    if len(data) == 12:
        id_ = data.decode().split('"')[3]  # perhaps not all of it
        request = next(r for r in server.run.requests.values() if r.id.startswith(id_))
        request.answer = "refuse"
        text = b"refused " + request.id.encode()
        request.must_be_refused = len(text) <= server.quotas[0]
        server.write(handle, text)


def _blind(server: BadServer, handle: int) -> None:
    server.sleep(3.0 + server.seconds)


BAD_SERVERS = [*map(_follow, ANSWERS), _refuse_early, _blind]

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


_LENGTHS = (511, 512, 513, 1535, 1536, 1537, 3583, 3584, 3585, 4096, 7680, 8192, 15872)


def in_line(run: Run) -> None:
    """Vmshim's clients at a server like the reference's: one is served, one is in line.

    One in eleven of these servers is vmshim's.
    """
    draw = run.random
    run.bad_server = draw.random() < 10 / 11
    server = Reference(run, "reference")
    if run.bad_server:
        server.start(server.serve_all)
    else:
        _add_server(run)
    for number in range(draw.choice((1, 2, 2, 3, 4))):
        _add_client(run, number, long_ids=True)
    for request in run.requests.values():
        request.timeout = draw.choice((0.0, 0.001, 0.01, 0.05, 0.1, 0.3, 5.0, None))
        request.seconds = draw.choice((0.0, 0.01, 0.05, 0.1, 0.3))
        request.answer = draw.choice(("success", "refuse"))
        if request.timeout is None and (request.fills_a_buffer() or not run.bad_server):
            request.timeout = 5.0  # both wait for each other: for the newline, and for the response
    _end_when_done(run, server.process)
    _add_faults(run)
    run.quiet = _is_quiet(run)


def _end_when_done(run: Run, process: Process) -> None:
    """End a server's process when there are no clients any more."""
    clients = [task for task in run.scheduler.tasks if task.name == "main"]

    def watch() -> None:
        while any(not task.ended for task in clients):
            run.scheduler.sleep(0.05)
        run.end_process(process)

    run.scheduler.spawn(Process("watch"), "watch", watch)


def _add_server(run: Run, **settings: Any) -> ServerProcess:
    """Add a server that is told to stop when its clients have gone."""
    server = ServerProcess(run, run.new_slot("server"))
    server.stop_by, server.stop_when, server.serve_twice = "shutdown", "idle", False
    vars(server).update(settings)
    run.main(server.slot, server.main)
    return server


def calm(run: Run) -> None:
    """Nothing goes wrong, only the order is random: each request must be answered."""
    draw = run.random
    _add_server(run, request_timeout=draw.choice((None, 0.5, 10.0)))
    for number in range(draw.randrange(2, 7)):
        _add_client(run, number, draw.choice((-1.0, 0.001, 0.001, 0.05)))
    if draw.random() < 0.5:
        _add_peer(run, 9, _slow, draw.choice((0.0, 0.001)))
    for request in run.requests.values():
        request.connect_timeout = request.timeout = 20.0
        if draw.random() < 0.2:
            request.seconds = 0.7  # longer than a client has for a step
    run.must_answer = True


def full(run: Run) -> None:
    """One request is handled and one waits: others see busy."""
    _add_server(run, max_clients=64)
    for number in range(5):
        _add_client(run, number, 0.03 * (number + 1))
    for place, request in enumerate(run.requests.values()):
        request.connect_timeout, request.timeout = 0.0, 10.0
        request.seconds = 0.5
        request.expected = ("success", "refused") if place < 2 else ("not sent",)


def silence(run: Run) -> None:
    """Silent clients delay an honest one by nothing, those that don't read by 10 ms each."""
    draw = run.random
    _add_server(run, request_timeout=draw.choice((None, 1.0, 1.0, 10.0)), max_clients=64)
    peers = draw.choices((*_SILENT, _lingerer), k=draw.randrange(2, 6))
    for number, behave in enumerate(peers):
        _add_peer(run, number, behave, 0.001)
    _add_client(run, 0, draw.choice((0.001, draw.random() * 1.2)))
    for request in run.requests.values():
        request.expected = ("success",) if request.id[0] == "c" else ()
        request.connect_timeout = request.timeout = 5.0
        request.seconds, request.answer = 0.0, "success"
    # Windows may be late, and a wait has whole milliseconds.
    run.honest_limit = 0.003 + 0.011 * peers.count(_sleeper)


_LOWER_LIMIT = 1 << 14


def hoard(run: Run) -> None:
    """Clients send as much as they can: what the server holds is bounded, and they are told."""
    draw = run.random
    server = _add_server(run, request_timeout=1.0, max_clients=draw.choice((1, 2, 5)))
    module = server.slot.module.__dict__
    module["MAX_REQUEST"] = _LOWER_LIMIT  # or a run would take long
    for number in range(draw.randrange(1, 6)):
        _add_peer(run, number, _hoarder, 0.001)
    _add_client(run, 0)
    for request in run.requests.values():
        request.answer = "success"
    allowed = (server.max_clients + 1) * (_LOWER_LIMIT + 4 * 4096)

    def weigh() -> None:
        while any(not task.ended for task in run.peers):
            held = _weigh([server.server, module["_under_way"]])
            if held > allowed:
                run.broken("bound", f"the server holds {held} bytes, not {allowed}")
            for client in server.server._clients if server.server else ():
                if client.request and client.step in ("respond", "leave"):
                    run.broken("bound", "a request that is answered is kept")
            run.scheduler.sleep(0.001)

    run.scheduler.spawn(Process("watch"), "watch", weigh)


def _hoarder(peer: Peer, draw: random.Random, request: Request) -> None:
    """Send a request without an end, and see what comes of it."""
    handle = peer.open(3.0)
    if not handle:
        return
    began, busy, jumped = peer.world.now, peer.run.seconds_handled(), peer.world.jumped
    count = draw.choice((0, 1, 3, 9))
    size = draw.choice((1000, 5000, _LOWER_LIMIT // 2 + 50))
    pieces = [b"a" * size] * ((_LOWER_LIMIT - 99) // size + count * _LOWER_LIMIT // size)
    pieces = [b"".join(pieces)] if draw.random() < 0.3 else pieces
    for piece in [b'{"ID":"', *pieces]:
        if not peer.write(handle, piece):
            break
    if not count:  # not too long: it holds what it may
        peer.sleep(draw.choice((0.1, 2.0)))
        return
    answer = peer.read(handle, 100)
    took = peer.world.now - began - (peer.run.seconds_handled() - busy)
    if (
        not answer.startswith(b"the request is longer than")
        or took > 0.5 + peer.world.jumped - jumped
    ):
        peer.run.broken("told", f"{request} was told {answer!r} of its length after {took:.3f} s")


def _weigh(held: list[Any]) -> int:
    """Return how many bytes of data these objects of vmshim's hold."""
    seen: dict[int, Any] = {}
    while held:
        each = held.pop()
        is_ours = type(each).__module__ == "vmshim" or isinstance(each, (dict, list, tuple))
        if id(each) not in seen and (is_ours or isinstance(each, (bytes, bytearray, ctypes.Array))):
            seen[id(each)] = each
            held.extend(gc.get_referents(each) if is_ours else ())
    data = (each for each in seen.values() if isinstance(each, (bytes, bytearray, ctypes.Array)))
    return sum(sys.getsizeof(each) for each in data)


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
        self.ends_by = draw.choice(("close", "deadline"))
        self.deadline = draw.choice((0.0, 0.05, 0.3, None))
        self.pause = draw.choice((0.0, 0.0, 0.001, 0.3))
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
            if self.ends_by == "deadline":
                pipe.deadline = self.run.scheduler.now
        except (Exception, KeyboardInterrupt) as error:
            self._check_error(error)
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
        jumped = self.run.scheduler.jumped
        self.run.scheduler.sleep(0.15)
        if self.run.scheduler.jumped > jumped:  # both waits ended with the jump
            self.run.scheduler.sleep(0.15)
        for operation in self.slot.process.operations:
            self.run.broken("left", f"{operation.kind} is pending after close()")

    def _check(self, pipe: Any) -> None:
        scheduler = self.run.scheduler
        give_up = scheduler.now + 1.0
        while any(not task.ended for task in self.threads) and scheduler.now < give_up:
            scheduler.sleep(0.05)
        if not all(task.ended for task in self.threads):
            self.run.broken("left", "a thread goes on after close()")
        self.threads.clear()
        self.run.check_clean(self.slot, "after its pipe is closed")
        whole = b"".join(self.sent)
        if not whole.startswith(self.received):
            self.run.broken("data", f"read {self.received!r} of {whole!r}")
        whole = b"".join(self.written)
        if not whole.startswith(self.arrived):
            self.run.broken("data", f"{self.arrived!r} arrived of {whole!r}")

    def _check_error(self, error: BaseException) -> None:
        if isinstance(error, self.slot.module.__dict__["VMShimError"]):
            self.run.check_error(error)
            return
        is_closed = isinstance(error, ValueError) and "closed" in str(error)
        if not (is_closed or isinstance(error, KeyboardInterrupt)):
            self.run.broken("exception", f"a pipe's user got {error!r}")

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
        def guarded() -> None:
            try:
                body()
            except Exception as error:
                self._check_error(error)

        self.threads.append(start_thread(self.run.kernel, self.slot.process, "thread", guarded))


def plumbing(run: Run) -> None:
    """A Pipe in several threads."""
    user = Plumbing(run)
    user.peer.start(lambda: user.peer.serve(1))
    slot = user.slot

    def main() -> None:
        give_up = run.scheduler.now + 0.1
        while PIPE_KEY not in run.kernel.names and run.scheduler.now < give_up:
            run.scheduler.sleep(0.001)
        user.main()

    run.main(slot, main)
    _end_when_done(run, user.peer.process)
    _add_faults(run)


def rivals(run: Run) -> None:
    """Two servers want the same name: Windows lets the first have it."""
    draw = run.random
    server = _add_server(run, has_rival=True)
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
            _add_peer(run, number, draw.choice(PEERS), draw.choice((0.0, 0.0, 0.001, 0.02, 0.3)))
    if draw.random() < 0.05:
        draw.choice([*run.requests.values()]).answer = "exit"
    _add_faults(run)
    run.quiet = _is_quiet(run)


def _is_quiet(run: Run) -> bool:
    """Tell whether nobody dies or is interrupted, and no call fails."""
    interrupted = any(task.interrupts for task in run.scheduler.tasks)
    return not run.scheduler.actions and not run.faulty() and not interrupted


def _add_client(
    run: Run, number: int, start: float | None = None, *, long_ids: bool = False
) -> None:
    """Add a client; without a start it is drawn, and if that is below 0 it is as soon as can be."""
    draw = run.random
    slot = run.new_slot(f"client-{number}")
    turns = 1 if start is not None and start > 0 else draw.choice((1, 1, 2))
    requests = []
    for turn in range(turns):
        length = 0
        if long_ids or draw.random() < 0.1:
            length = draw.choice(
                (*_LENGTHS, *_LENGTHS, 0, 0, draw.randrange(9000), 4095, 4096, 4097)
            )
        id_ = f"c{number}.{turn}"
        # The object is 23 bytes longer.
        requests.append(run.new_request(id_.ljust(length - 23, "x")))
    seconds = draw.choice((0.0, 0.0, 0.0, 0.001, 0.01, 0.1)) if start is None else start

    def main() -> None:
        if seconds > 0:
            run.scheduler.sleep(seconds)
        while seconds < 0 and PIPE_KEY not in run.kernel.names:
            run.scheduler.sleep(STEP)
        for request in requests:
            run.issue(slot, request)
        run.check_clean(slot, "after its requests")
        run.kernel.end_process(slot.process)

    task = run.main(slot, main)
    run.peers.append(task)


def _ignore(process: Process, instance: Instance) -> None:
    """Nobody counts the clients any more."""


_SERVING = frozenset(("serve_forever", "_serve"))
# Where a Ctrl-C, mostly the second, may leave something for close() to do.
_CLEANING_UP = frozenset(("_end", "drop", "shutdown", "close", "__exit__"))


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
        self.security: str | None = None
        if draw.random() < 0.1:
            self.security = "D:P(A;;GA;;;BA)(A;;0x12019b;;;BU)(A;;GR;;;AN)"
            run.strangers_may_open = True
        self.server: Any = None
        self.has_rival = False
        self.early = 0
        self.opened = 0  # how many clients have come
        self.stops_begun = 0
        self.served = 0  # how many runs there were
        self.is_serving = False
        self.admins: list[Task] = []

    def main(self) -> None:
        module = self.slot.module.__dict__
        self.run.cut_off_after = self.request_timeout
        try:
            self._serve(module)
        except GreenletExit:
            raise
        except BaseException as error:
            if not self._may_end_with(error, module):
                self.run.broken("exception", f"the server got {error!r}")
            self._close()
        self.server = None
        for task in self.admins:
            while not task.ended:
                self.run.scheduler.sleep(0.05)
        self._check()
        if not self.slot.faulty and not self.has_rival:
            self._begin_again(module)
        self.run.kernel.end_process(self.slot.process)

    def _may_end_with(self, error: BaseException, module: dict[str, Any]) -> bool:
        if isinstance(error, module["PipeAccessError"]) and self.has_rival:
            return True
        if isinstance(error, ValueError):
            return self.server is not None and self.server._is_closed
        if isinstance(error, OSError):
            return bool(self.slot.faulty) and self.server is None
        return isinstance(error, (KeyboardInterrupt, SystemExit))

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
            security_descriptor=self.security,
        )
        self._start_admin(self._admin)
        self.early = self._count_clients()
        self.run.kernel.on_open = self._somebody_opens
        with self.server:
            try:
                self._serve_once()
            except KeyboardInterrupt as error:
                self._check_interrupted(error)
                raise
            if not self.run.stopping:
                self.run.broken("stop", "serve_forever() has ended by itself")
            if self.server._is_closed and PIPE_KEY in self.run.kernel.names:
                self.run.broken("name", "a server that is closed still has its name")
            if self.serve_twice and not self.server._is_closed:
                self._serve_again()

    def _serve_once(self) -> None:
        self.served += 1
        self.is_serving = True
        try:
            self.server.serve_forever()
        finally:
            self.is_serving = False

    def _serve_again(self) -> None:
        """The one call that has ended the first run doesn't end the next."""
        calls = self.stops_begun
        self.run.scheduler.sleep(self.run.random.choice((0.0, 0.0, 0.05)))
        self._serve_once()
        if calls == self.stops_begun == 1:
            self.run.broken("stop", "serve_forever() has ended, and nobody had asked for it")

    def _count_clients(self) -> int:
        """Return how many clients of other processes are connected."""
        name = self.run.kernel.names.get(PIPE_KEY)
        states = [i.state for i in name.instances] if name else []
        return states.count(CONNECTED)

    def _somebody_opens(self, process: Process, instance: Instance) -> None:
        if process is self.slot.process or self.slot.process.dead:
            return
        self.opened += 1
        count = self._count_clients()
        if count > self.max_clients + self.early:
            self.run.broken("bound", f"{count} clients at a time, not {self.max_clients}")
        # The event, and the instance that keeps the name.
        if len(self.slot.process.handles) > self.max_clients + self.early + 2:
            self.run.broken("bound", "the server keeps handles of clients that have gone")

    def _start_admin(self, function: Callable[[], None]) -> None:
        task = start_thread(self.run.kernel, self.slot.process, "admin", function)
        self.admins.append(task)

    def _check_interrupted(self, error: KeyboardInterrupt) -> None:
        """One Ctrl-C ends serve_forever() in time."""
        names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
        vmshims = [name for name in names if name in _SERVING]
        if not vmshims or vmshims[-1] == "serve_forever" or _CLEANING_UP.intersection(names):
            return
        scheduler = self.run.scheduler
        took = scheduler.now - scheduler.current.interrupted_at
        if took > STOP_SECONDS + scheduler.jumped + TOLERANCE:
            self.run.broken("timeout", f"serve_forever() ended {took:.3f} s after Ctrl-C")
        kept = len(self.slot.process.handles) - len(self.server._came_early)
        if kept > 2 and scheduler.current.interruptions < 3:  # the event, and what keeps the name
            self.run.broken("left", f"{error!r} keeps a client's handle open")

    def _handler(self, request: Any) -> None:
        called = self.run.scheduler.now
        if self.stop_by == "handler" and self.run.random.random() < 0.3:
            self.run.stopping = True
            self.run.requests[request.id].must_be_answered = True
            self.stops_begun += 1
            self.server.close()
        self.run.handle(self.slot, request, called)

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
        if not main.interrupts:
            self.run.stopping = True
            main.interrupts = [main.points + self.run.random.randrange(1, 30)]
            self.run.quiet = False
            self.run.scheduler.sleep(5.0)

    def _stop_once(self) -> None:
        self.run.stopping = True
        if self.stop_by == "two":
            self._start_admin(self._call_shutdown)
        self._call_shutdown()

    def _call_shutdown(self) -> None:
        scheduler = self.run.scheduler
        began, jumped = scheduler.now, scheduler.jumped
        server = self.server
        if server is None:
            return
        opened, idle = self.opened, not (self._count_clients() or self.run.handling)
        self.stops_begun += 1
        served = self.served if self.is_serving else 0
        if self.stop_by == "close":
            server.close()
        else:
            server.shutdown()
        self._check_time("shutdown()", began, jumped)
        took = scheduler.now - began - (scheduler.jumped - jumped)
        scheduler.sleep(0.002)
        if served == self.served and self.is_serving:
            self.run.broken("stop", "shutdown() has returned before serve_forever()")
        main = scheduler.tasks[0]
        calm = not (main.interruptions or main.interrupts or self.slot.faulty)
        if idle and opened == self.opened and calm and took > IDLE_STOP_SECONDS:
            self.run.broken("timeout", f"an idle server took {took:.3f} s to stop")

    def _check_time(self, what: str, began: float, jumped: float) -> None:
        took = self.run.scheduler.now - began - (self.run.scheduler.jumped - jumped)
        if took > STOP_SECONDS + TOLERANCE:
            self.run.broken("timeout", f"{what} took {took:.3f} s")

    def _check(self) -> None:
        self.run.check_clean(self.slot, "after the server's end")
        for line in self.slot.logged:
            if line.startswith("error") and not self._may_log(line):
                self.run.broken("exception", f"the server logged {line}")

    def _may_log(self, line: str) -> bool:
        return "the handler failed" in line or bool(self.slot.faulty)


def _add_faults(run: Run) -> None:
    """Draw what goes wrong."""
    for add in _add_interrupts, _add_death, _add_errors, _add_clock:
        add(run, random.Random(run.random.random()))


def _add_interrupts(run: Run, draw: random.Random) -> None:
    """Ctrl-C in a main thread, sometimes more of it soon after."""
    if draw.random() < 0.4:
        mains = [task for task in run.scheduler.tasks if task.name == "main"]
        task = draw.choice(mains[:1] * 3 + mains)
        points = 12.0 if run.deep else 9.0
        first = int(2 ** (draw.random() * points))
        task.interrupts = [first]
        while draw.random() < 0.5:
            last = task.interrupts[-1]
            task.interrupts.append(last + int(2 ** (draw.random() * (points - 4))))


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
        slot.faulty = frozenset(draw.sample([*DOCUMENTED_ERRORS], 2))


def _add_clock(run: Run, draw: random.Random) -> None:
    """A time.monotonic() that moves in steps, as before Python 3.13 on Windows, and jumps."""
    if draw.random() < 0.2:
        for slot in run.slots[: run.used]:
            slot.clock_step = 0.0156
    if draw.random() < 0.05:
        seconds = draw.random() * 3
        run.scheduler.later(draw.random() * 0.1, lambda: run.scheduler.jump(seconds))


SCENARIOS: list[tuple[float, Callable[[Run], None]]] = [
    (0.55, in_line),  # in ten of eleven of these the server is like the reference's
    (0.77, service),
    (0.81, calm),
    (0.86, exchange),
    (0.94, plumbing),
    (0.97, silence),
    (0.98, full),
    (0.99, hoard),
    (1.00, rivals),
]


def scenario_for(seed: int) -> Callable[[Run], None]:
    """Return the scenario of a seed."""
    drawn = random.Random(seed ^ 0xFACE).random()
    return next(scenario for share, scenario in SCENARIOS if drawn < share)
