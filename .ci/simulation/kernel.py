"""A strict model of what vmshim asks of Windows: named pipes, overlapped I/O, events.

The functions have Win32's names, argument orders and errors, and take the ctypes objects that the
real ones take. What they model is documented by Microsoft under

- https://learn.microsoft.com/windows/win32/ipc/named-pipes (life of an instance, modes, names),
- https://learn.microsoft.com/windows/win32/sync/synchronization-and-overlapped-input-and-output,
- https://learn.microsoft.com/windows/win32/ipc/named-pipe-security-and-access-rights,

and, where that is silent, pinned by the conformance tests of Wine (which also run on Windows) or
read off ReactOS's npfs driver. histories.py holds each such fact as a history that can be run.

The model is stricter than a kernel: it calls Scheduler.broken() as soon as the caller does what
would corrupt memory or hang: memory that is freed or used twice while an operation is pending, a
handle that is used after it is closed, a wait for something that isn't pending. How it knows that
memory is freed: it holds weak references to the OVERLAPPED and to a ctypes buffer, with a callback;
bytes can't be referred to weakly, so it holds them and counts the other references at the end.

What nobody knows about Windows is done either way, as the seed decides (Scheduler.chance).
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import re
import sys
import weakref
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Callable, Iterable, NamedTuple

from simulation.histories import SecurityAttributes

# ---- What Windows calls things ------------------------------------------------------------------

# https://learn.microsoft.com/openspecs/windows_protocols/ms-erref/ (NTSTATUS values)
ERRORS: dict[int, int] = {}  # the Win32 error for each


def _status(status: int, error: int) -> int:
    ERRORS[status] = error
    return status


SUCCESS = _status(0, 0)
PENDING = _status(0x103, 997)
BUFFER_OVERFLOW = _status(0x80000005, 234)
ILLEGAL_FUNCTION = _status(0xC00000AF, 1)
PIPE_DISCONNECTED = _status(0xC00000B0, 233)
PIPE_CLOSING = _status(0xC00000B1, 232)
PIPE_CONNECTED = _status(0xC00000B2, 535)
PIPE_LISTENING = _status(0xC00000B3, 536)
CANCELLED = _status(0xC0000120, 995)
PIPE_BROKEN = _status(0xC000014B, 109)
ACCESS_DENIED = _status(0xC0000022, 5)
WARNINGS = (SUCCESS, BUFFER_OVERFLOW)  # what completes an operation at once

ERROR_FILE_NOT_FOUND = 2
ERROR_PATH_NOT_FOUND = 3
ERROR_ACCESS_DENIED = 5
ERROR_INVALID_HANDLE = 6
ERROR_INVALID_PARAMETER = 87
ERROR_SEM_TIMEOUT = 121
ERROR_INVALID_NAME = 123
ERROR_PIPE_BUSY = 231
ERROR_MR_MID_NOT_FOUND = 317
ERROR_IO_PENDING = 997
ERROR_NOT_FOUND = 1168
ERROR_UNKNOWN_REVISION = 1305
ERROR_INVALID_ACL = 1336
WAIT_TIMEOUT = 258
WAIT_FAILED = 0xFFFFFFFF
INFINITE = 0xFFFFFFFF
LONGEST_WAIT = 100  # milliseconds: a wait inside Windows ignores Ctrl-C
RETRY_TIME = 0.15  # seconds in which a server tries again to make an instance
INVALID_HANDLE_VALUE: int = 2 ** (8 * ctypes.sizeof(ctypes.c_void_p)) - 1

FILE_READ_DATA = 1
FILE_WRITE_DATA = 2
FILE_CREATE_PIPE_INSTANCE = 4
FILE_GENERIC_READ = 0x120089
FILE_GENERIC_WRITE = 0x120116  # with FILE_CREATE_PIPE_INSTANCE
FILE_GENERIC_EXECUTE = 0x1200A0
FILE_ALL_ACCESS = 0x1F01FF
ALWAYS_WANTED = 0x100080  # SYNCHRONIZE and FILE_READ_ATTRIBUTES: CreateFileW adds them
GENERIC_RIGHTS = {
    0x80000000: FILE_GENERIC_READ,
    0x40000000: FILE_GENERIC_WRITE,
    0x20000000: FILE_GENERIC_EXECUTE,
    0x10000000: FILE_ALL_ACCESS,
}
FILE_FLAG_OVERLAPPED = 0x40000000
FILE_FLAG_FIRST_PIPE_INSTANCE = 0x00080000
PIPE_ACCESS_INBOUND = 1
PIPE_ACCESS_OUTBOUND = 2
PIPE_ACCESS_DUPLEX = 3
PIPE_TYPE_MESSAGE = 4
PIPE_READMODE_MESSAGE = 2
PIPE_UNLIMITED_INSTANCES = 255

LISTENING, CONNECTED, CLOSING, DISCONNECTED = "listening", "connected", "closing", "disconnected"


# Which trustees of a DACL stand for whom. "Everyone" (WD) doesn't include anonymous users.
ACCOUNTS = {
    "administrator": frozenset(("WD", "AU", "BU", "BA")),
    "system": frozenset(("WD", "AU", "BA", "SY")),
    "user": frozenset(("WD", "AU", "BU")),
    "anonymous": frozenset(("AN",)),
}


class Process:
    """A simulated process: its handles, who runs it, and whether it lives."""

    def __init__(self, name: str, *, account: str = "administrator", first_handle: int = 4) -> None:
        self.name = name
        self.account = account
        self.dead = False
        self.handles: dict[int, Waitable] = {}
        self.first_handle = first_handle
        self.next_value = first_handle
        self.operations: list[Operation] = []
        self.descriptors: dict[int, Any] = {}  # what LocalFree has to free
        self.refused_at = -math.inf  # when Windows last refused it an instance of a pipe
        self.under_way: Any = ()  # the addresses of what it takes to be under way


# ---- Objects that a handle can stand for --------------------------------------------------------


class Waitable:
    """What WaitForSingleObject can wait for."""

    def __init__(self, signaled: bool) -> None:
        self.signaled = signaled
        self.manual_reset = True
        self.waiters: list[Any] = []
        self.signaled_for: set[Any] = set()  # whose operations have ended since the last reset
        self.missed_by: set[Any] = set()  # whose signal the start of another operation took away


class Event(Waitable):
    """What CreateEventW makes."""

    def __init__(self, signaled: bool, manual_reset: bool) -> None:
        super().__init__(signaled)
        self.manual_reset = manual_reset
        self.users = 0  # operations under way that will set it
        self.ended: list[Operation] = []  # those that have set it, as long as they have memory


@dataclass(eq=False)
class Message:
    """What is left of one write in a queue, and how much of it the quota covers."""

    data: bytes
    offset: int
    serial: int
    operation: Operation | None
    covered: int = 0

    @property
    def rest(self) -> int:
        return len(self.data) - self.offset


@dataclass(eq=False)
class Queue:
    """One direction of an instance: unread messages, or else reads that wait for some."""

    quota: int
    messages: deque[Message] = field(default_factory=deque)
    reads: deque[Operation] = field(default_factory=deque)
    flushes: list[Operation] = field(default_factory=list)
    next_serial: int = 0


class File(Waitable):
    """One end of an instance, as a handle stands for it."""

    def __init__(
        self, instance: Instance, access: int, overlapped: bool, message_reads: bool
    ) -> None:
        super().__init__(True)
        self.instance = instance
        self.is_server = False
        self.can_read = bool(access & FILE_READ_DATA)
        self.can_write = bool(access & FILE_WRITE_DATA)
        self.overlapped = overlapped
        self.message_reads = message_reads
        self.cut = False  # a client's end after the server's DisconnectNamedPipe
        self.told_gone = math.inf  # when it was first told that the other end has closed
        self.closed_at = math.inf
        self.last_read = 0.0  # when a read was last told of its end; infinity if it will be soon
        self.operations: list[Operation] = []
        self.incoming = instance.inbound
        self.outgoing = instance.outbound


class Instance:
    """One instance of a named pipe: a server's end, and a client's or none."""

    def __init__(self, name: PipeName, outbound_quota: int, inbound_quota: int) -> None:
        self.name = name
        self.state = LISTENING
        self.listening_since = 0
        self.inbound = Queue(inbound_quota)
        self.outbound = Queue(outbound_quota)
        self.connects: list[Operation] = []
        self.server: File | None = None
        self.client: File | None = None


@dataclass(eq=False)
class PipeName:
    """A name in the pipes' folder, with what all of its instances share."""

    path: str
    access: int
    limit: int
    message_type: bool
    timeout: float
    descriptor: Descriptor
    owner: str  # the account that made the first instance
    instances: list[Instance] = field(default_factory=list)

    def rights(self, process: Process) -> int:
        """Return what a process may do to the pipe."""
        trustees = ACCOUNTS[process.account]
        if process.account == self.owner:
            trustees |= {"OW"}
        return self.descriptor.rights(trustees)


# ---- Operations ---------------------------------------------------------------------------------


class Operation:
    """One call of ReadFile, WriteFile, ConnectNamedPipe or FlushFileBuffers (Windows: an IRP)."""

    def __init__(self, kind: str, process: Process, task: Any, file: File, size: int) -> None:
        self.kind = kind
        self.process = process
        self.task = task
        self.file = file
        self.size = size
        self.phase = "starting"  # then "pending" and "ended", or "failed at once"
        self.finished = False  # npfs is done with it; the caller may not have been told yet
        self.status = PENDING
        self.count = 0
        self.data = b""
        self.cancelled = False  # the caller has asked for its end
        self.ended_at = math.inf
        self.address = 0
        self.with_overlapped: Any = None
        self.buffer: Any = None
        self.held: Any = None
        self.event: Event | None = None
        self.queue: Queue | None = None  # where a write waits
        self.line: Any = None  # where any other waits
        self.serial = 0
        self.written = b""
        self.message_reads = file.message_reads
        self.waiters: list[Any] = []


class Descriptor(NamedTuple):
    """A security descriptor's DACL: what is allowed or denied to whom."""

    entries: Any

    def rights(self, trustees: frozenset[str]) -> int:
        """Return what somebody may do who is all of these."""
        granted = denied = 0
        for kind, rights, trustee in self.entries:
            if trustee in trustees:
                if kind == "D":
                    denied |= rights & ~granted
                else:
                    granted |= rights & ~denied
        return granted


# Without a descriptor, everyone and anonymous users may read.
DEFAULT_DESCRIPTOR = Descriptor(
    [
        *(("A", FILE_ALL_ACCESS, trustee) for trustee in ("SY", "BA", "OW")),
        *(("A", FILE_GENERIC_READ, trustee) for trustee in ("WD", "AN")),
    ]
)


# ---- The kernel ---------------------------------------------------------------------------------

_HARMLESS = ("CancelIoEx", "SetEvent", "read", "write")  # where there is no handle
_PROTECTED = "PROTECTEDPREFIX\\ADMINISTRATORS\\"
_SDDL = re.compile(r"(?:[OG]:[A-Z0-9-]+)*(?:D:([A-Z]*)((?:\([^()]*\))*))?(?:S:.*)?")
_ACE = re.compile(r"\(([^;()]*);([^;()]*);([^;()]*);([^;()]*);([^;()]*);([^;()]*)\)")
_RIGHTS = {
    "GR": FILE_GENERIC_READ,
    "GW": FILE_GENERIC_WRITE,
    "GX": FILE_GENERIC_EXECUTE,
    "FR": FILE_GENERIC_READ,
    "FW": FILE_GENERIC_WRITE,
    "FX": FILE_GENERIC_EXECUTE,
    "GA": FILE_ALL_ACCESS,
    "FA": FILE_ALL_ACCESS,
}
_TRUSTEES = frozenset(re.findall("..", "ACANAOAUBABGBOBUCACGCODADCDDDGDUEAEDERISIULALGLSLULWMEMU"))
_TRUSTEES |= frozenset(re.findall("..", "NONSNUOWPAPOPSPURCRDRERUSASISOSUSYWDWR"))


class Kernel:
    """All that the simulated processes share. Its world is the Scheduler."""

    def __init__(self, world: Any, *, strict: bool = True, reuse_handles: bool = False) -> None:
        self.world = world
        self.strict = strict
        self.reuse_handles = reuse_handles or not strict
        self.judges_waits = strict
        self.names: dict[str, PipeName] = {}
        # Who waits for a pipe of each name, and whether an instance was offered since.
        self.waiters: dict[str, dict[Any, bool]] = {}
        self.started: dict[int, Operation] = {}  # the last operation for each OVERLAPPED
        self.listens = 0
        self.on_open: Callable[[Process, Instance], object] = _ignore
        self.on_write: Callable[[Operation], object] = _ignore

    def _broken(self, rule: str, text: str) -> None:
        if self.strict:
            self.world.broken(rule, text)

    # Handles.

    def _result(self, code: int) -> int:
        """Return as a function with a BOOL does: 1, or 0 and the error."""
        if code:
            self.world.current.last_error = code
            return 0
        return 1

    def _new_handle(self, process: Process, object_: Waitable) -> int:
        value = process.next_value
        process.next_value += 4
        if self.reuse_handles:
            # As Windows and Wine do: the lowest free value. Otherwise none is used twice, so that
            # each use of a closed handle shows.
            value = next(v for v in itertools.count(4, 4) if v not in process.handles)
        process.handles[value] = object_
        return value

    def _object(self, process: Process, handle: Any, kind: type, function: str) -> Any:
        """Return what a handle stands for, or None."""
        value = _value(handle)
        found = process.handles.get(value)
        if isinstance(found, kind):
            return found
        if value in (0, INVALID_HANDLE_VALUE) and function in _HARMLESS:
            return None  # it fails; nobody else's handle has these values
        state = "of another kind" if found else "closed" if 0 < value < 2**31 else "no handle"
        self._broken("handle", f"{function} got a handle that is {state}: {value:#x}")
        return None

    def CloseHandle(self, process: Process, handle: Any) -> int:
        """Close a handle, and the end of a pipe that it stands for; each object has one handle."""
        value = _value(handle)
        object_ = process.handles.pop(value, None)
        if object_ is None:
            if value == INVALID_HANDLE_VALUE:  # stands for the process itself
                return 1
            if value:
                self._broken("handle", f"CloseHandle({value:#x}), which is closed already")
            return self._result(ERROR_INVALID_HANDLE) if self.world.current else 0
        if isinstance(object_, File):
            self._close_end(object_)
        return 1

    def end_process(self, process: Process) -> None:
        """Do what Windows does when a process ends: cancel its operations, close its handles."""
        process.dead = True
        for operation in list(process.operations):
            self._withdraw(operation)
            operation.phase = "ended"
        process.operations.clear()
        for handle in list(process.handles):
            self.CloseHandle(process, handle)

    def end_thread(self, process: Process, task: Any) -> None:
        """Cancel what a thread that ends has started."""
        for operation in list(process.operations):
            if operation.task is task and not operation.finished:
                self._finish_withdrawn(operation, CANCELLED)

    def _wake(self, waiters: Iterable[Any]) -> None:
        for task in waiters:
            self.world.wake(task)

    def _block_until(self, ready: Callable[[], bool], waiters: list[Any], deadline: float) -> bool:
        """Sleep until something is so; return whether it is."""
        while not ready():
            if self.world.now >= deadline:
                return False
            task = self.world.current
            waiters.append(task)
            self.world.block(deadline)
            if task in waiters:
                waiters.remove(task)
        return True

    def _after(self, milliseconds: int) -> float:
        """Return when a timeout that Win32 counts in milliseconds is over."""
        return math.inf if milliseconds == INFINITE else self.world.now + milliseconds / 1000

    # https://learn.microsoft.com/windows/win32/fileio/naming-a-file and the life of an instance.

    def CreateNamedPipeW(self, process: Process, path: Any, *arguments: Any) -> int:
        """Make an instance, which listens at once."""
        open_mode, pipe_mode, max_instances, out_size, in_size, timeout, attributes = arguments
        key, error = _key(_text(path))
        access = open_mode & PIPE_ACCESS_DUPLEX
        message_type = bool(pipe_mode & PIPE_TYPE_MESSAGE)
        message_reads = bool(pipe_mode & PIPE_READMODE_MESSAGE)
        if not error and (
            not access or not 1 <= max_instances <= 255 or (message_reads and not message_type)
        ):
            error = ERROR_INVALID_PARAMETER
        name = self.names.get(key)
        if not error and name is None:
            error = self._may_create(process, key)
        if not error and name is not None:
            error = self._may_add(process, name, access, open_mode)
        if error:
            process.refused_at = self.world.now
            self._result(error)
            return INVALID_HANDLE_VALUE
        if name is None:
            name = PipeName(
                key,
                access,
                max_instances,
                message_type,
                (timeout or 50) / 1000,
                _descriptor(process, attributes),
                process.account,
            )
            self.names[key] = name
        instance = Instance(name, out_size, in_size)
        rights = (access & PIPE_ACCESS_INBOUND and FILE_READ_DATA) | (
            access & PIPE_ACCESS_OUTBOUND and FILE_WRITE_DATA
        )
        file = File(instance, rights, bool(open_mode & FILE_FLAG_OVERLAPPED), message_reads)
        file.is_server = True
        instance.server = file
        name.instances.append(instance)
        self._listen(instance)
        return self._new_handle(process, file)

    def _may_create(self, process: Process, key: str) -> int:
        if key.startswith(_PROTECTED) and "BA" not in ACCOUNTS[process.account]:
            return ERROR_ACCESS_DENIED
        # A pipe's name can't be a folder of another's (npfs looks the longest prefix up).
        parts = key.split("\\")
        if any("\\".join(parts[:count]) in self.names for count in range(1, len(parts))):
            return ERROR_INVALID_NAME
        return 0

    def _may_add(self, process: Process, name: PipeName, access: int, open_mode: int) -> int:
        wanted = ALWAYS_WANTED | FILE_CREATE_PIPE_INSTANCE
        wanted |= FILE_GENERIC_READ if access & PIPE_ACCESS_INBOUND else 0
        wanted |= FILE_GENERIC_WRITE if access & PIPE_ACCESS_OUTBOUND else 0
        if wanted & ~name.rights(process):
            return ERROR_ACCESS_DENIED
        if name.limit != PIPE_UNLIMITED_INSTANCES and len(name.instances) >= name.limit:
            return ERROR_PIPE_BUSY
        if access != name.access or open_mode & FILE_FLAG_FIRST_PIPE_INSTANCE:
            return ERROR_ACCESS_DENIED
        return 0

    def _listen(self, instance: Instance) -> None:
        instance.state = LISTENING
        self.listens += 1
        instance.listening_since = self.listens
        waiters = self.waiters.get(instance.name.path, {})
        for task in waiters:
            waiters[task] = True
            self.world.wake(task)

    def CreateFileW(self, process: Process, path: Any, access: int, *arguments: Any) -> int:
        """Open a pipe: the instance that has listened longest gets the client."""
        _share, _attributes, _disposition, flags, _template = arguments
        key, error = _key(_text(path))
        name = self.names.get(key)
        if not error and name is None:
            below = key.split("\\")
            prefixes = ("\\".join(below[:count]) for count in range(1, len(below)))
            known = any(prefix in self.names for prefix in prefixes)
            error = ERROR_INVALID_NAME if known else ERROR_FILE_NOT_FOUND
        listening: list[Instance] = []
        wanted = 0
        if not error and name is not None:
            # npfs takes the right to create instances from what a client asks for.
            wanted = (_mapped(access) | ALWAYS_WANTED) & ~FILE_CREATE_PIPE_INSTANCE
            excluded = (0 if name.access & PIPE_ACCESS_INBOUND else FILE_WRITE_DATA) | (
                0 if name.access & PIPE_ACCESS_OUTBOUND else FILE_READ_DATA
            )
            listening = [i for i in name.instances if i.state is LISTENING]
            if wanted & excluded or wanted & ~name.rights(process):
                error = ERROR_ACCESS_DENIED
            elif not listening:
                error = ERROR_PIPE_BUSY
        if error:
            self._result(error)
            return INVALID_HANDLE_VALUE
        instance = min(listening, key=lambda instance: instance.listening_since)
        file = File(instance, wanted, bool(flags & FILE_FLAG_OVERLAPPED), False)
        file.incoming, file.outgoing = instance.outbound, instance.inbound
        instance.client = file
        instance.state = CONNECTED
        connects, instance.connects = instance.connects, []
        for operation in connects:
            self._finish(operation, SUCCESS)
        self.on_open(process, instance)
        return self._new_handle(process, file)

    def WaitNamedPipeW(self, process: Process, path: Any, milliseconds: int) -> int:
        """Wait until an instance is offered. Nothing is reserved: it may be taken by then."""
        key, error = _key(_text(path))
        name = self.names.get(key)
        if error or name is None:
            return self._result(error or ERROR_FILE_NOT_FOUND)
        if any(instance.state is LISTENING for instance in name.instances):
            return 1
        deadline = self._after(milliseconds) if milliseconds else self.world.now + name.timeout
        task = self.world.current
        waiters = self.waiters.setdefault(key, {})
        waiters[task] = False
        # Nobody is sure whether the end of the last instance ends the wait.
        heeds_end = not self.world.chance(0.5)
        while not waiters[task] and self.world.now < deadline:
            if key not in self.names and heeds_end:
                break
            self.world.block(deadline)
        if waiters.pop(task):
            return 1
        gone = key not in self.names and heeds_end
        return self._result(ERROR_FILE_NOT_FOUND if gone else ERROR_SEM_TIMEOUT)

    def _close_end(self, file: File) -> None:
        """An end is closed."""
        instance = file.instance
        file.closed_at = self.world.now
        for operation in list(file.operations):
            # A write that others can still read goes on without its handle, or it doesn't.
            if operation.kind != "write" or self.world.chance(0.5):
                self._finish_withdrawn(operation, PIPE_BROKEN)
        if file.is_server:
            instance.server = None
            name = instance.name
            name.instances.remove(instance)
            if not name.instances:
                del self.names[name.path]
                self._wake(self.waiters.get(name.path, ()))
            if instance.state is LISTENING:
                return
        elif file.cut:
            return
        else:
            instance.client = None
        self._drop(file.incoming, PIPE_BROKEN)
        other = instance.client if file.is_server else instance.server
        if other is None:
            self._drop(file.outgoing, PIPE_BROKEN)
        else:
            for operation in list(file.outgoing.reads):
                self._finish_withdrawn(operation, PIPE_BROKEN)
        if instance.state is CONNECTED:
            instance.state = CLOSING

    def _drop(self, queue: Queue, status: int) -> None:
        """Forget what nobody will read any more, and end the writes and flushes that wait."""
        waiting = [message.operation for message in queue.messages if message.operation]
        queue.messages.clear()
        for place, operation in enumerate(waiting):
            # Nobody is sure that a write behind others fails; its data is dropped all the same.
            if place and queue.quota and self.world.chance(0.5):
                self._finish(operation, SUCCESS, operation.size)
            self._finish(operation, status)
        for flush in list(queue.flushes):
            self._finish_withdrawn(flush, status)

    def DisconnectNamedPipe(self, process: Process, handle: Any) -> int:
        """Throw the client out, with all that is unread in both directions."""
        file = self._object(process, handle, File, "DisconnectNamedPipe")
        if not file:
            return self._result(ERROR_INVALID_HANDLE)
        instance = file.instance
        if not file.is_server:
            return self._result(ERRORS[ILLEGAL_FUNCTION])
        if instance.state is DISCONNECTED:
            return self._result(ERRORS[PIPE_DISCONNECTED])
        for operation in list(instance.connects):
            self._finish_withdrawn(operation, PIPE_DISCONNECTED)
        for queue in (instance.inbound, instance.outbound):
            for operation in list(queue.reads):
                self._finish_withdrawn(operation, PIPE_DISCONNECTED)
            self._drop(queue, PIPE_DISCONNECTED)
        if instance.client:
            instance.client.cut = True
            instance.client = None
        instance.state = DISCONNECTED
        return 1

    # https://learn.microsoft.com/windows/win32/ipc/named-pipe-type-read-and-wait-modes

    def _state(self, file: File) -> str:
        return DISCONNECTED if file.cut else file.instance.state

    def ConnectNamedPipe(self, process: Process, handle: Any, overlapped: Any) -> int:
        """Wait for a client."""
        operation = self._start("connect", process, handle, overlapped, None, 0)
        return self._connect(operation, overlapped) if operation else 0

    def _connect(self, operation: Operation, overlapped: Any) -> int:
        file = operation.file
        state = self._state(file)
        status = PENDING
        if not file.is_server:
            status = ILLEGAL_FUNCTION
        elif state is CONNECTED:
            status = PIPE_CONNECTED
        elif state is CLOSING:
            status = PIPE_CLOSING
        else:
            if state is DISCONNECTED:
                self._listen(file.instance)
            operation.line = file.instance.connects
            operation.line.append(operation)
        return self._started(operation, status, None)

    def ReadFile(
        self, process: Process, handle: Any, buffer: Any, size: int, count: Any, overlapped: Any
    ) -> int:
        """Read what there is, or wait for some."""
        operation = self._start("read", process, handle, overlapped, buffer, size)
        if not operation:
            return 0
        file = operation.file
        state = self._state(file)
        if not file.can_read:
            status = ACCESS_DENIED
        elif state is LISTENING:
            status = PIPE_LISTENING
        elif state is DISCONNECTED:
            status = PIPE_DISCONNECTED
        elif file.incoming.messages:
            status, operation.data = self._take(file.incoming, size, file.message_reads)
            operation.count = len(operation.data)
        elif state is CLOSING:
            status = PIPE_BROKEN
        else:
            status = PENDING
            operation.line = file.incoming.reads
            operation.line.append(operation)
        return self._started(operation, status, count)

    def _take(self, queue: Queue, size: int, message_reads: bool) -> tuple[int, bytes]:
        """Take up to `size` bytes out of a queue that isn't empty."""
        first = queue.messages[0]
        if not size and first.rest:
            return (BUFFER_OVERFLOW if message_reads else SUCCESS), b""
        taken = bytearray()
        while queue.messages:
            message = queue.messages[0]
            piece = message.data[message.offset : message.offset + size - len(taken)]
            taken += piece
            message.offset += len(piece)
            if message.rest:
                break
            queue.messages.popleft()
            if message.operation:
                self._finish(message.operation, SUCCESS, len(message.data))
            # A byte reader with room to spare swallows a zero-length message.
            if message_reads or len(taken) >= size:
                break
        self._share_quota(queue)
        # Nobody is sure that a second write never ends before its rest is covered.
        second = queue.messages[1] if queue.quota and len(queue.messages) > 1 else None
        if second and second.operation and self.world.chance(0.5):
            operation, second.operation = second.operation, None
            self._finish(operation, SUCCESS, len(second.data))
        more = message_reads and queue.messages and queue.messages[0] is first
        return (BUFFER_OVERFLOW if more else SUCCESS), bytes(taken)

    def _share_quota(self, queue: Queue) -> None:
        """Give the quota to the messages in order; a write ends once its unread rest is covered."""
        free = queue.quota
        for message in list(queue.messages):
            message.covered = min(message.rest, free)
            free -= message.covered
            if message.operation and message.covered == message.rest:
                operation, message.operation = message.operation, None
                self._finish(operation, SUCCESS, len(message.data))
        self._end_flushes(queue)

    def _end_flushes(self, queue: Queue) -> None:
        oldest = queue.messages[0].serial if queue.messages else queue.next_serial
        for flush in list(queue.flushes):
            if flush.serial <= oldest:
                queue.flushes.remove(flush)
                self._finish(flush, SUCCESS)

    def WriteFile(
        self, process: Process, handle: Any, buffer: Any, size: int, count: Any, overlapped: Any
    ) -> int:
        """Hand data to reads that wait, and queue the rest as far as the quota goes."""
        operation = self._start("write", process, handle, overlapped, buffer, size)
        if not operation:
            return 0
        file = operation.file
        state = self._state(file)
        operation.written = data = _bytes(buffer, size)
        if not file.can_write:
            status = ACCESS_DENIED
        elif state is LISTENING:
            status = PIPE_LISTENING
        elif state is DISCONNECTED:
            status = PIPE_DISCONNECTED
        elif state is CLOSING:
            status = PIPE_CLOSING
        else:
            operation.count = len(data)
            status = self._put(file.outgoing, data, operation)
            self.on_write(operation)
        return self._started(operation, status, count)

    def _put(self, queue: Queue, data: bytes, operation: Operation) -> int:
        message_type = operation.file.instance.name.message_type
        if not data and not message_type:
            return SUCCESS
        offset = 0
        while queue.reads and (offset < len(data) or not data):
            reading = queue.reads.popleft()
            piece = data[offset : offset + reading.size]
            offset += len(piece)
            more = reading.message_reads and offset < len(data)
            reading.data = piece
            self._finish(reading, BUFFER_OVERFLOW if more else SUCCESS, len(piece))
            if not data:
                return SUCCESS
        if data and offset == len(data):
            return SUCCESS
        message = Message(data, offset, queue.next_serial, operation)
        queue.next_serial += 1
        free = queue.quota - sum(other.covered for other in queue.messages)
        message.covered = min(message.rest, free)
        queue.messages.append(message)
        if message.covered == message.rest:
            message.operation = None
            return SUCCESS
        operation.queue = queue
        return PENDING

    def FlushFileBuffers(self, process: Process, handle: Any) -> int:
        """Wait until the other end has read all that this end has written so far."""
        operation = self._start("flush", process, handle, None, None, 0)
        if not operation:
            return 0
        file = operation.file
        status = SUCCESS
        if file.cut:
            status = PIPE_DISCONNECTED
        elif self._state(file) is CONNECTED and file.outgoing.messages:
            status = PENDING
            operation.serial = file.outgoing.next_serial
            operation.line = file.outgoing.flushes
            operation.line.append(operation)
        return self._started(operation, status, None)

    # https://learn.microsoft.com/windows/win32/api/minwinbase/ns-minwinbase-overlapped

    def _start(
        self,
        kind: str,
        process: Process,
        handle: Any,
        overlapped: Any,
        buffer: Any,
        size: int,
    ) -> Operation | None:
        """Begin an operation: the event, or else the handle, is reset, and Internal is pending."""
        file = self._object(process, handle, File, kind)
        if not file:
            self._result(ERROR_INVALID_HANDLE)
            return None
        operation = Operation(kind, process, self.world.current, file, size)
        overlapped = getattr(overlapped, "_obj", overlapped)
        if overlapped is not None:
            address = ctypes.addressof(overlapped)
            before = self.started.get(address)
            if before and before.phase == "pending":
                self._broken("memory", f"{kind} uses the OVERLAPPED of a pending operation")
            operation.address = address
            freed = self._freed(operation, "OVERLAPPED")
            operation.with_overlapped = weakref.ref(overlapped, freed)
            event = overlapped.hEvent
            if event:
                operation.event = self._object(process, event, Event, kind)
                if operation.event:
                    self._reset(operation.event)
            self.started[address] = operation
            overlapped.Internal = PENDING
        self._reset(file)
        if kind == "read":
            buffer = getattr(buffer, "_obj", buffer)
            operation.buffer = weakref.ref(buffer, self._freed(operation, "buffer"))
        elif kind == "write":
            operation.held = buffer
        return operation

    def _freed(self, operation: Operation, what: str) -> Callable[[Any], None]:
        def freed(reference: Any) -> None:
            if operation.phase == "pending" and not operation.process.dead:
                self._broken("memory", f"{what} of a pending {operation.kind} is freed")
            elif self.started.get(operation.address) is operation:
                del self.started[operation.address]

        return freed

    def _started(self, operation: Operation, status: int, count: Any) -> int:
        """Return from the call that began an operation."""
        if status == PENDING:
            return self._left_pending(operation, count)
        if status not in WARNINGS:
            # Internal stays at pending, and the event is never set.
            operation.phase = "failed at once"
            operation.held = None
            if status == PIPE_BROKEN:
                operation.file.told_gone = min(operation.file.told_gone, self.world.now)
            return self._result(ERRORS[status])
        operation.status = status
        operation.finished = True
        self._deliver(operation)
        if count is not None:
            has_overlapped = operation.with_overlapped is not None
            _store(count, 0 if status and has_overlapped else operation.count)
        return self._result(ERRORS[status])

    def _left_pending(self, operation: Operation, count: Any) -> int:
        file = operation.file
        operation.phase = "pending"
        operation.process.operations.append(operation)
        file.operations.append(operation)
        if operation.event:
            operation.event.users += 1
        if operation.with_overlapped is not None and file.overlapped:
            return self._result(ERROR_IO_PENDING)
        self._block_until(lambda: operation.phase == "ended", operation.waiters, math.inf)
        if count is not None:
            _store(count, operation.count)
        return self._result(ERRORS[operation.status])

    def _withdraw(self, operation: Operation) -> None:
        """Take an operation out of the queue that it waits in."""
        if operation.finished:
            return
        line, queue = operation.line, operation.queue
        if line is not None and operation in line:
            line.remove(operation)
        if operation.kind == "write" and queue is not None:
            for message in list(queue.messages):
                if message.operation is operation:
                    queue.messages.remove(message)
            self._share_quota(queue)

    def _finish_withdrawn(self, operation: Operation, status: int) -> None:
        self._withdraw(operation)
        self._finish(operation, status)

    def _finish(self, operation: Operation, status: int, count: int = 0) -> None:
        """Npfs is done with a pending operation; the caller is told now or a little later."""
        if operation.finished:
            return
        operation.finished = True
        operation.status = status
        operation.count = count
        if operation.phase != "pending":  # still inside the call that began it
            return
        seconds = self.world.delay("completion")
        if seconds:
            if operation.kind == "read":
                operation.file.last_read = math.inf
            self.world.later(seconds, partial(self._deliver, operation))
        else:
            self._deliver(operation)

    def _deliver(self, operation: Operation) -> None:
        """Write the result where the caller wants it, then give the signal."""
        if operation.phase == "ended":
            return
        was_pending = operation.phase == "pending"
        file = operation.file
        if was_pending:
            operation.process.operations.remove(operation)
            file.operations.remove(operation)
            if operation.event:
                operation.event.users -= 1
        operation.phase = "ended"
        operation.ended_at = self.world.now
        if operation.status == PIPE_BROKEN:
            file.told_gone = min(file.told_gone, self.world.now)
        overlapped = operation.with_overlapped and operation.with_overlapped()
        if operation.kind == "read":
            file.last_read = self.world.now
            self._fill_buffer(operation)
        elif was_pending and operation.held is not None:
            self._check_written(operation)
        operation.held = None
        if overlapped is not None:
            overlapped.InternalHigh = operation.count
            overlapped.Internal = operation.status
        if operation.kind != "flush":  # FlushFileBuffers has an event of its own inside
            waitable = operation.event or file
            waitable.signaled_for.add(operation.task)
            if operation.event:
                operation.event.ended.append(operation)
            self._signal(waitable)
        self._wake(operation.waiters)

    def _fill_buffer(self, operation: Operation) -> None:
        buffer = operation.buffer()
        if buffer is None or not operation.data:
            return
        if ctypes.sizeof(buffer) < operation.size:
            self._broken("memory", f"a buffer is smaller than the {operation.size} told")
        ctypes.memmove(buffer, operation.data, len(operation.data))

    def _check_written(self, operation: Operation) -> None:
        """What a write sends must live and stay the same until the write has ended."""
        held = operation.held
        if _bytes(held, operation.size) != operation.written:
            self._broken("memory", "the data of a pending write was changed")
        # The operation's reference, this function's, and getrefcount's own.
        if operation.size > 1 and sys.getrefcount(held) <= 3:
            self._broken("memory", "the data of a pending write was freed")

    def _signal(self, waitable: Waitable) -> None:
        waitable.signaled = True
        self._wake(waitable.waiters)

    def _reset(self, waitable: Waitable) -> None:
        """The start of an operation takes away the signal that another one's end has given."""
        waitable.signaled = False
        waitable.missed_by |= waitable.signaled_for - {self.world.current}
        waitable.signaled_for.clear()

    def CancelIoEx(self, process: Process, handle: Any, overlapped: Any) -> int:
        """Ask for the end of an operation, or of all of them; it may have ended by itself."""
        file = self._object(process, handle, File, "CancelIoEx")
        if not file:
            return self._result(ERROR_INVALID_HANDLE)
        overlapped = getattr(overlapped, "_obj", overlapped)
        address = 0 if overlapped is None else ctypes.addressof(overlapped)
        found = [
            operation
            for operation in file.operations
            if operation.process is process and (not address or operation.address == address)
        ]
        # One that has ended, but whose end isn't told yet, may count as found or not.
        found = [o for o in found if not o.finished or self.world.chance(0.5)]
        for operation in found:
            operation.cancelled = True
            seconds = self.world.delay("cancel")
            if seconds:
                self.world.later(seconds, partial(self._cancel, operation))
            else:
                self._cancel(operation)
        return self._result(0 if found else ERROR_NOT_FOUND)

    def _cancel(self, operation: Operation) -> None:
        if not operation.finished and not operation.process.dead:
            self._finish_withdrawn(operation, CANCELLED)

    def RtlNtStatusToDosError(self, process: Process, status: int) -> int:
        """Return the Win32 error that an NTSTATUS stands for."""
        return ERRORS.get(status, ERROR_MR_MID_NOT_FOUND)

    # https://learn.microsoft.com/windows/win32/sync/using-event-objects

    def CreateEventW(
        self, process: Process, attributes: Any, manual_reset: int, initial: int, name: Any
    ) -> int:
        """Make an event."""
        return self._new_handle(process, Event(bool(initial), bool(manual_reset)))

    def SetEvent(self, process: Process, handle: Any) -> int:
        """Set an event."""
        event = self._object(process, handle, Event, "SetEvent")
        if not event:
            return self._result(ERROR_INVALID_HANDLE)
        self._signal(event)
        return 1

    def WaitForSingleObject(self, process: Process, handle: Any, milliseconds: int) -> int:
        """Wait for a signal."""
        waitable = self._object(process, handle, Waitable, "WaitForSingleObject")
        if not waitable:
            self._result(ERROR_INVALID_HANDLE)
            return WAIT_FAILED
        if self.judges_waits and milliseconds:
            self._check_wait(process, waitable, milliseconds)
        ended = self._wait(waitable, self._after(milliseconds))
        self.world.current.waited_at = self.world.now
        return 0 if ended else WAIT_TIMEOUT

    def _check_wait(self, process: Process, waitable: Waitable, milliseconds: int) -> None:
        """Whoever waits does so for something under way, or for a reason that is named here."""
        if milliseconds > LONGEST_WAIT:
            self._broken("wait", f"a wait of {milliseconds} ms: nobody sees Ctrl-C meanwhile")
        if waitable.signaled:
            return
        task = self.world.current
        if isinstance(waitable, Event):
            waitable.ended = [
                o for o in waitable.ended if o.with_overlapped() and o.address in process.under_way
            ]
            for operation in waitable.ended:
                self._broken("wait", f"a wait though the end of a {operation.kind} is not taken")
            # Windows has refused an instance of the pipe, and the server tries again soon.
            if self.world.now - process.refused_at < RETRY_TIME or waitable.users:
                return
        elif not isinstance(waitable, File) or waitable.operations:
            return
        elif task in waitable.missed_by:
            # The operation has ended, but another thread has started one on the same handle.
            waitable.missed_by.remove(task)
            return
        self._broken("wait", "a wait for a signal that nothing pending will give")

    def _wait(self, waitable: Waitable, deadline: float) -> bool:
        if not self._block_until(lambda: waitable.signaled, waitable.waiters, deadline):
            return False
        if not waitable.manual_reset:
            waitable.signaled = False
            waitable.signaled_for.clear()
        return True

    # https://learn.microsoft.com/windows/win32/secauthz/security-descriptor-string-format

    def ConvertStringSecurityDescriptorToSecurityDescriptorW(
        self, process: Process, text: Any, revision: int, descriptor: Any, size: Any
    ) -> int:
        """Read a security descriptor's text; the caller frees the result by LocalFree."""
        if revision != 1:
            return self._result(ERROR_UNKNOWN_REVISION)
        try:
            parsed = _parse_sddl(_text(text))
        except ValueError as error:
            return self._result(int(str(error)))
        address = process.first_handle + 0x8000 + 16 * len(process.descriptors)
        process.descriptors[address] = parsed
        getattr(descriptor, "_obj", descriptor).value = address
        return 1

    def LocalFree(self, process: Process, memory: Any) -> int:
        """Free what ConvertStringSecurityDescriptorToSecurityDescriptorW made."""
        if process.descriptors.get(_value(memory)) is None:
            self._broken("memory", "LocalFree of what isn't allocated")
            return _value(memory)
        process.descriptors[_value(memory)] = None
        return 0


def _ignore(*what: Any) -> None:
    """Nobody wants to know who opens a pipe, or what is written."""


# ---- Names, numbers and memory ------------------------------------------------------------------


def _value(handle: Any) -> int:
    """Return a handle's or a pointer's value as a number."""
    value = getattr(handle, "value", handle)
    if not isinstance(value, int):
        return 0
    return value & INVALID_HANDLE_VALUE


def _text(text: Any) -> str:
    return str(getattr(text, "value", text) or "")


def _bytes(buffer: Any, size: int) -> bytes:
    if isinstance(buffer, bytes):
        return buffer[:size]
    buffer = getattr(buffer, "_obj", buffer)
    return b"" if buffer is None else bytes(memoryview(buffer).cast("B")[:size])


def _store(target: Any, number: int) -> None:
    """Write a number where a pointer to a DWORD or a ULONG_PTR leads; NULL is nowhere."""
    if target is None:
        return
    target = getattr(target, "_obj", target)
    if hasattr(target, "contents"):
        target = target.contents
    target.value = number


@functools.lru_cache(maxsize=None)
def _key(path: str) -> tuple[str, int]:
    """Return a pipe's name in the form in which names are compared, or an error."""
    if not path:
        return "", ERROR_PATH_NOT_FOUND
    if path.startswith("\\\\?\\"):
        rest = path[4:]
    else:
        match = re.match(r"[\\/]{2}\.[\\/](.*)", path, re.DOTALL)
        rest = _normalize(match.group(1)) if match else ""
    if rest[:5].upper() != "PIPE\\" or len(rest) == 5:
        return "", ERROR_INVALID_NAME
    return rest[5:].upper(), 0


def _normalize(path: str) -> str:
    r"""Do to a path below \\.\ what the Win32 path rules do."""
    parts: list[str] = []
    for part in path.replace("/", "\\").split("\\"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    if parts:
        parts[-1] = parts[-1].rstrip(". ")
    return "\\".join(parts)


def _mapped(mask: int) -> int:
    """Return the rights of a mask, with those that its generic rights stand for."""
    for generic, rights in GENERIC_RIGHTS.items():
        if mask & generic:
            mask = mask & ~generic | rights
    return mask


def _parse_sddl(text: str) -> Descriptor:
    """Read the DACL of a security descriptor's text; a ValueError's text is Win32's error."""
    match = _SDDL.fullmatch(text)
    if match is None or (text and not re.match("[OGDS]:", text)):
        raise ValueError(str(ERROR_INVALID_PARAMETER if ":" not in text[:2] else ERROR_INVALID_ACL))
    if "D:" not in text:
        return DEFAULT_DESCRIPTOR
    entries = []
    for kind, flags, rights, _object, _inherited, trustee in _ACE.findall(match.group(2) or ""):
        if kind not in ("A", "D") or (trustee not in _TRUSTEES and not trustee.startswith("S-1-")):
            raise ValueError(str(ERROR_INVALID_ACL))
        if "IO" not in flags:  # only for what is created below
            entries.append((kind, _parse_rights(rights), trustee))
    return Descriptor(entries)


def _parse_rights(text: str) -> int:
    if text.startswith("0x"):
        return _mapped(int(text, 16))
    rights = 0
    for place in range(0, len(text), 2):
        if text[place : place + 2] not in _RIGHTS:
            raise ValueError(str(ERROR_INVALID_ACL))
        rights |= _RIGHTS[text[place : place + 2]]
    return rights


def _descriptor(process: Process, attributes: Any) -> Descriptor:
    """Return the descriptor that a SECURITY_ATTRIBUTES leads to."""
    attributes = getattr(attributes, "_obj", attributes)
    if attributes is None:
        return DEFAULT_DESCRIPTOR
    read = SecurityAttributes.from_buffer_copy(attributes)
    if not read.lpSecurityDescriptor:
        return DEFAULT_DESCRIPTOR
    found = process.descriptors.get(read.lpSecurityDescriptor)
    assert found, "the security descriptor is freed"
    return Descriptor(found.entries)
