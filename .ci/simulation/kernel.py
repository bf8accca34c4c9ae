"""A strict model of what vmshim asks of Windows: named pipes, overlapped I/O, completion ports.

The functions have Win32's names, argument orders and errors, and take the ctypes objects that the
real ones take. What they model is documented by Microsoft under

- https://learn.microsoft.com/windows/win32/ipc/named-pipes (life of an instance, modes, names),
- https://learn.microsoft.com/windows/win32/sync/synchronization-and-overlapped-input-and-output,
- https://learn.microsoft.com/windows/win32/fileio/i-o-completion-ports,
- https://learn.microsoft.com/windows/win32/ipc/named-pipe-security-and-access-rights,

and, where that is silent, pinned by the conformance tests of Wine (which also run on Windows) or
read off ReactOS's npfs driver. histories.py holds each such fact as a history that can be run.

The model is stricter than a kernel: it calls `World.broken` as soon as the caller does what would
corrupt memory or hang: memory that is freed or used twice while an operation is pending, a handle
that is used after it is closed, a wait for something that isn't pending. How it knows that memory
is freed: it holds weak references to the OVERLAPPED and to a ctypes buffer, with a callback; bytes
can't be referred to weakly, so it holds them and counts the other references at the end.
"""

from __future__ import annotations

import ctypes
import math
import re
import sys
import weakref
from collections import deque
from functools import partial
from typing import Any, Callable, Iterator, Protocol

# ---- What Windows calls things ------------------------------------------------------------------

# https://learn.microsoft.com/openspecs/windows_protocols/ms-erref/ (NTSTATUS values)
SUCCESS = 0
PENDING = 0x103
BUFFER_OVERFLOW = 0x80000005
INVALID_HANDLE = 0xC0000008
ILLEGAL_FUNCTION = 0xC00000AF
PIPE_DISCONNECTED = 0xC00000B0
PIPE_CLOSING = 0xC00000B1
PIPE_CONNECTED = 0xC00000B2
PIPE_LISTENING = 0xC00000B3
INVALID_PIPE_STATE = 0xC00000AD
CANCELLED = 0xC0000120
PIPE_BROKEN = 0xC000014B
ACCESS_DENIED = 0xC0000022

ERRORS = {
    SUCCESS: 0,
    PENDING: 997,
    BUFFER_OVERFLOW: 234,
    INVALID_HANDLE: 6,
    ILLEGAL_FUNCTION: 1,
    PIPE_DISCONNECTED: 233,
    PIPE_CLOSING: 232,
    PIPE_CONNECTED: 535,
    PIPE_LISTENING: 536,
    INVALID_PIPE_STATE: 230,
    CANCELLED: 995,
    PIPE_BROKEN: 109,
    ACCESS_DENIED: 5,
}
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
ERROR_ABANDONED_WAIT_0 = 735
ERROR_IO_INCOMPLETE = 996
ERROR_IO_PENDING = 997
ERROR_NOT_FOUND = 1168
ERROR_UNKNOWN_REVISION = 1305
ERROR_INVALID_ACL = 1336
WAIT_TIMEOUT = 258
WAIT_FAILED = 0xFFFFFFFF
INFINITE = 0xFFFFFFFF
INVALID_HANDLE_VALUE: int = 2 ** (8 * ctypes.sizeof(ctypes.c_void_p)) - 1

GENERIC_READ = 0x80000000
GENERIC_WRITE = 0x40000000
GENERIC_ALL = 0x10000000
FILE_READ_DATA = 1
FILE_WRITE_DATA = 2
FILE_CREATE_PIPE_INSTANCE = 4
READ_RIGHTS = FILE_READ_DATA
WRITE_RIGHTS = FILE_WRITE_DATA | FILE_CREATE_PIPE_INSTANCE
ALL_RIGHTS = READ_RIGHTS | WRITE_RIGHTS
OPEN_EXISTING = 3
FILE_FLAG_OVERLAPPED = 0x40000000
FILE_FLAG_FIRST_PIPE_INSTANCE = 0x00080000
PIPE_ACCESS_INBOUND = 1
PIPE_ACCESS_OUTBOUND = 2
PIPE_ACCESS_DUPLEX = 3
PIPE_TYPE_MESSAGE = 4
PIPE_READMODE_MESSAGE = 2
PIPE_UNLIMITED_INSTANCES = 255

LISTENING, CONNECTED, CLOSING, DISCONNECTED = "listening", "connected", "closing", "disconnected"


class Task(Protocol):
    """One thread of a simulated process, as far as the kernel knows it."""

    last_error: int


class World(Protocol):
    """Who decides what happens next, and when: the scheduler."""

    now: float
    current: Any

    def block(self, deadline: float) -> bool:
        """Put the current thread to sleep; return whether it was woken before the deadline."""

    def wake(self, task: Any) -> None:
        """Make a sleeping thread able to go on."""

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Have something happen after some virtual time."""

    def delay(self, what: str) -> float:
        """Tell how late the kernel does something this time, in seconds; mostly 0."""

    def chance(self, probability: float) -> bool:
        """Toss a coin."""

    def broken(self, rule: str, text: str) -> None:
        """Take note that a rule is broken; the run ends soon."""

    def note(self, text: str) -> None:
        """Add a line to the history."""


class Process:
    """A simulated process: its handles, who runs it, and whether it lives."""

    def __init__(self, name: str, *, elevated: bool = True, first_handle: int = 4) -> None:
        self.name = name
        self.elevated = elevated
        self.dead = False
        self.handles: dict[int, Waitable] = {}
        self.first_handle = first_handle
        self.next_value = first_handle
        self.operations: list[Operation] = []
        self.descriptors: dict[int, Any] = {}  # what LocalFree has to free


# ---- Objects that a handle can stand for --------------------------------------------------------


class Waitable:
    """What WaitForSingleObject can wait for."""

    def __init__(self, signaled: bool) -> None:
        self.signaled = signaled
        self.manual_reset = True
        self.references = 0
        self.waiters: list[Any] = []


class Event(Waitable):
    """What CreateEventW makes."""

    def __init__(self, signaled: bool, manual_reset: bool) -> None:
        super().__init__(signaled)
        self.manual_reset = manual_reset
        self.users = 0  # operations under way that will set it


class Packet:
    """What a completion port hands out."""

    def __init__(self, status: int, count: int, key: int, address: int) -> None:
        self.status = status
        self.count = count
        self.key = key
        self.address = address
        self.memory: Any = None  # a weak reference to the OVERLAPPED, which must live until then


class Port(Waitable):
    """What CreateIoCompletionPort makes."""

    def __init__(self) -> None:
        super().__init__(False)
        self.packets: deque[Packet] = deque()
        self.closed = False


class Message:
    """What is left of one write in a queue, and how much of it the quota covers."""

    __slots__ = ("covered", "data", "offset", "operation", "serial")

    def __init__(self, data: bytes, offset: int, serial: int, operation: Operation | None) -> None:
        self.data = data
        self.offset = offset
        self.covered = 0
        self.serial = serial
        self.operation = operation

    @property
    def rest(self) -> int:
        return len(self.data) - self.offset


class Queue:
    """One direction of an instance: unread messages, or else reads that wait for some."""

    __slots__ = ("flushes", "messages", "next_serial", "quota", "reads")

    def __init__(self, quota: int) -> None:
        self.quota = quota
        self.messages: deque[Message] = deque()
        self.reads: deque[Operation] = deque()
        self.flushes: list[Operation] = []
        self.next_serial = 0


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
        self.port: Port | None = None
        self.key = 0
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

    def ends(self) -> Iterator[File]:
        if self.server:
            yield self.server
        if self.client:
            yield self.client


class PipeName:
    """A name in the pipes' folder, with what all of its instances share."""

    def __init__(
        self,
        path: str,
        access: int,
        limit: int,
        message_type: bool,
        timeout: float,
        descriptor: Descriptor,
    ) -> None:
        self.path = path
        self.access = access
        self.limit = limit
        self.message_type = message_type
        self.timeout = timeout
        self.descriptor = descriptor
        self.instances: list[Instance] = []
        self.waiters: list[Any] = []


# ---- Operations ---------------------------------------------------------------------------------


class Operation:
    """One call of ReadFile, WriteFile, ConnectNamedPipe or FlushFileBuffers (Windows: an IRP)."""

    __slots__ = (
        "__weakref__",
        "address",
        "buffer",
        "cancel_requested",
        "count",
        "data",
        "event",
        "file",
        "finished",
        "held",
        "kind",
        "message_reads",
        "packet_wanted",
        "phase",
        "process",
        "queue",
        "serial",
        "size",
        "status",
        "task",
        "vain_waits",
        "waiters",
        "with_overlapped",
        "written",
    )

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
        self.address = 0
        self.with_overlapped: Any = None
        self.buffer: Any = None
        self.held: Any = None
        self.event: Event | None = None
        self.packet_wanted = True
        self.cancel_requested = False
        self.queue: Queue | None = None
        self.serial = 0
        self.written = b""
        self.message_reads = file.message_reads
        self.waiters: list[Any] = []
        self.vain_waits = 0


class Descriptor:
    """A security descriptor's DACL: pairs of a trustee and rights; None grants as by default."""

    def __init__(self, entries: Any = None) -> None:
        self.entries = entries

    def rights(self, process: Process) -> int:
        """Return what a process may do to the pipe."""
        trustees = {"WD", "AU", "BU", *(("BA", "OW", "CO") if process.elevated else ())}
        if self.entries is None:
            # Administrators and the owner: all; everyone: read.
            return ALL_RIGHTS if process.elevated else READ_RIGHTS
        granted = denied = 0
        for kind, rights, trustee in self.entries:
            if trustee in trustees:
                if kind == "D":
                    denied |= rights & ~granted
                else:
                    granted |= rights & ~denied
        return granted


# ---- The kernel ---------------------------------------------------------------------------------

_KEYS: dict[str, tuple[str, int]] = {}  # paths that have been looked at
_PROTECTED = "PROTECTEDPREFIX\\ADMINISTRATORS\\"
_SDDL = re.compile(r"(?:[OG]:[A-Z0-9-]+)*(?:D:([A-Z]*)((?:\([^()]*\))*))?(?:S:.*)?")
_ACE = re.compile(r"\(([^;()]*);([^;()]*);([^;()]*);([^;()]*);([^;()]*);([^;()]*)\)")
_RIGHTS = {
    "GA": ALL_RIGHTS,
    "FA": ALL_RIGHTS,
    "GR": READ_RIGHTS,
    "FR": READ_RIGHTS,
    "GW": WRITE_RIGHTS,
    "FW": WRITE_RIGHTS,
    "GX": 0,
    "FX": 0,
}
_TRUSTEES = frozenset(
    (
        *("AC", "AN", "AO", "AU", "BA", "BG", "BO", "BU", "CA", "CG", "CO", "DA", "DC", "DD"),
        *("DG", "DU", "EA", "ED", "ER", "IS", "IU", "LA", "LG", "LS", "LU", "LW", "ME", "MU"),
        *("NO", "NS", "NU", "OW", "PA", "PO", "PS", "PU", "RC", "RD", "RE", "RU", "SA", "SI"),
        *("SO", "SU", "SY", "WD", "WR"),
    )
)


class Kernel:
    """All that the simulated processes share."""

    def __init__(self, world: World, *, strict: bool = True, reuse_handles: bool = False) -> None:
        self.world = world
        self.strict = strict
        self.reuse_handles = reuse_handles or not strict
        self.keys = _KEYS
        self.names: dict[str, PipeName] = {}
        self.started: dict[int, Operation] = {}  # the last operation for each OVERLAPPED
        self.listens = 0
        self.on_open: Callable[[Process, Instance], object] = _ignore

    def _broken(self, rule: str, text: str) -> None:
        if self.strict:
            self.world.broken(rule, text)

    # Handles.

    def _error(self, code: int) -> int:
        self.world.current.last_error = code
        return 0

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
            value = next(v for v in range(4, value + 4, 4) if v not in process.handles)
        process.handles[value] = object_
        object_.references += 1
        return value

    def _object(self, process: Process, handle: Any, kind: type, function: str) -> Any:
        """Return what a handle stands for, or None."""
        value = _value(handle)
        found = process.handles.get(value)
        if isinstance(found, kind):
            return found
        if not value and function in ("CancelIoEx", "PostQueuedCompletionStatus"):
            return None  # does nothing
        if self.strict:
            state = "of another kind" if found else "closed" if 0 < value < 2**31 else "no handle"
            self._broken("handle", f"{function} got a handle that is {state}: {value:#x}")
        return None

    def CloseHandle(self, process: Process, handle: Any) -> int:
        """Close a handle; the last one to an end of a pipe closes that end."""
        value = _value(handle)
        object_ = process.handles.pop(value, None)
        if object_ is None:
            if value == INVALID_HANDLE_VALUE:  # stands for the process itself
                return 1
            if value:
                self._broken("handle", f"CloseHandle({value:#x}), which is closed already")
            return self._result(ERROR_INVALID_HANDLE) if self.world.current else 0
        self._release(object_)
        return 1

    def _release(self, object_: Waitable) -> None:
        object_.references -= 1
        if object_.references:
            return
        if isinstance(object_, File):
            self._close_end(object_)
        elif isinstance(object_, Port):
            object_.closed = True
            self._wake(object_.waiters)

    def end_process(self, process: Process) -> None:
        """Do what Windows does when a process ends: cancel its operations, close its handles."""
        process.dead = True
        for operation in list(process.operations):
            self._withdraw(operation)
            operation.phase = "ended"
        process.operations.clear()
        for object_ in list(process.handles.values()):
            self._release(object_)
        process.handles.clear()

    def end_thread(self, process: Process, task: Any) -> None:
        """Cancel what a thread that ends has started, where there is no completion port."""
        for operation in list(process.operations):
            if operation.task is task and not operation.finished and not operation.file.port:
                self._finish_withdrawn(operation, CANCELLED)

    def _wake(self, waiters: list[Any]) -> None:
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

    def _key(self, path: Any) -> tuple[str, int]:
        """Return a pipe's name in the form in which names are compared, or an error."""
        path = _text(path)
        found = self.keys.get(path)
        if found is None:
            found = self.keys[path] = self._find_key(path)
        return found

    def _find_key(self, path: str) -> tuple[str, int]:
        if not path:
            return "", ERROR_PATH_NOT_FOUND
        if path.startswith("\\\\?\\"):
            rest = path[4:]
        else:
            match = re.match(r"[\\/]{2}([^\\/]+)[\\/](.*)", path, re.DOTALL)
            if not match or match.group(1) != ".":
                return "", ERROR_INVALID_NAME
            rest = _normalize(match.group(2))
        if rest[:5].upper() != "PIPE\\" or len(rest) == 5:
            return "", ERROR_INVALID_NAME
        return rest[5:].upper(), 0

    def CreateNamedPipeW(
        self,
        process: Process,
        path: Any,
        open_mode: int,
        pipe_mode: int,
        max_instances: int,
        out_size: int,
        in_size: int,
        timeout: int,
        attributes: Any,
    ) -> int:
        """Make an instance, which listens at once."""
        key, error = self._key(path)
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
            self._error(error)
            return INVALID_HANDLE_VALUE
        if name is None:
            descriptor = _descriptor(process, attributes)
            seconds = (timeout or 50) / 1000
            name = PipeName(key, access, max_instances, message_type, seconds, descriptor)
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
        if key.startswith(_PROTECTED) and not process.elevated:
            return ERROR_ACCESS_DENIED
        # A pipe's name can't be a folder of another's (npfs looks the longest prefix up).
        parts = key.split("\\")
        if any("\\".join(parts[:count]) in self.names for count in range(1, len(parts))):
            return ERROR_INVALID_NAME
        return 0

    def _may_add(self, process: Process, name: PipeName, access: int, open_mode: int) -> int:
        if not name.descriptor.rights(process) & FILE_CREATE_PIPE_INSTANCE:
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
        self._wake(instance.name.waiters)

    def CreateFileW(
        self,
        process: Process,
        path: Any,
        access: int,
        share: int,
        attributes: Any,
        disposition: int,
        flags: int,
        template: Any,
    ) -> int:
        """Open a pipe: the instance that has listened longest gets the client."""
        key, error = self._key(path)
        name = self.names.get(key)
        if not error and name is None:
            below = key.split("\\")
            prefixes = ("\\".join(below[:count]) for count in range(1, len(below)))
            known = any(prefix in self.names for prefix in prefixes)
            error = ERROR_INVALID_NAME if known else ERROR_FILE_NOT_FOUND
        listening: list[Instance] = []
        wanted = 0
        if not error and name is not None:
            wanted = _wanted(access)
            possible = (name.access & PIPE_ACCESS_INBOUND and FILE_WRITE_DATA) | (
                name.access & PIPE_ACCESS_OUTBOUND and FILE_READ_DATA
            )
            listening = [i for i in name.instances if i.state is LISTENING]
            if wanted & ~possible or wanted & ~name.descriptor.rights(process):
                error = ERROR_ACCESS_DENIED
            elif not listening:
                error = ERROR_PIPE_BUSY
        if error:
            self._error(error)
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
        """Wait until some instance listens; that reserves nothing."""
        key, error = self._key(path)
        name = self.names.get(key)
        if error or name is None:
            return self._result(error or ERROR_FILE_NOT_FOUND)
        deadline = self._after(milliseconds) if milliseconds else self.world.now + name.timeout
        pipe = name

        def over() -> bool:
            return not pipe.instances or any(i.state is LISTENING for i in pipe.instances)

        if not self._block_until(over, pipe.waiters, deadline):
            return self._result(ERROR_SEM_TIMEOUT)
        return self._result(0 if pipe.instances else ERROR_FILE_NOT_FOUND)

    def _close_end(self, file: File) -> None:
        """The last handle to an end is closed."""
        instance = file.instance
        for operation in list(file.operations):
            # A write that others can still read goes on without its handle.
            if not operation.finished and operation.kind != "write":
                self._finish_withdrawn(operation, PIPE_BROKEN)
        if file.is_server:
            instance.server = None
            name = instance.name
            name.instances.remove(instance)
            if not name.instances:
                del self.names[name.path]
                self._wake(name.waiters)
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
        messages = list(queue.messages)
        queue.messages.clear()
        for message in messages:
            if message.operation:
                self._finish(message.operation, status)
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
            file.instance.connects.append(operation)
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
            operation.queue = file.incoming
            file.incoming.reads.append(operation)
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
            status = self._put(file.outgoing, data, operation)
            operation.count = len(data)
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
            operation.queue = file.outgoing
            file.outgoing.flushes.append(operation)
        return self._started(operation, status, None)

    def SetNamedPipeHandleState(
        self, process: Process, handle: Any, mode: Any, count: Any, timeout: Any
    ) -> int:
        """Choose between byte and message reads."""
        file = self._object(process, handle, File, "SetNamedPipeHandleState")
        if not file:
            return self._result(ERROR_INVALID_HANDLE)
        if file.cut:
            return self._result(ERRORS[PIPE_DISCONNECTED])
        message_reads = bool(_number(getattr(mode, "_obj", mode)) & PIPE_READMODE_MESSAGE)
        if message_reads and not file.instance.name.message_type:
            return self._result(ERROR_INVALID_PARAMETER)
        file.message_reads = message_reads
        return 1

    def PeekNamedPipe(
        self, process: Process, handle: Any, buffer: Any, size: int, read: Any, all_: Any, left: Any
    ) -> int:
        """Look at what could be read."""
        file = self._object(process, handle, File, "PeekNamedPipe")
        if not file:
            return self._result(ERROR_INVALID_HANDLE)
        state = self._state(file)
        queue = file.incoming
        if file.cut:
            return self._result(ERRORS[PIPE_DISCONNECTED])
        if state in (LISTENING, DISCONNECTED):
            return self._result(ERRORS[INVALID_PIPE_STATE])
        if state is CLOSING and not queue.messages:
            return self._result(ERRORS[PIPE_BROKEN])
        first = queue.messages[0].rest if queue.messages else 0
        data = b"".join(message.data[message.offset :] for message in queue.messages)
        if buffer is not None:
            if file.message_reads:
                data = data[:first]
            ctypes.memmove(buffer, data, min(size, len(data)))
        _store(read, min(size, len(data)))
        _store(all_, sum(message.rest for message in queue.messages))
        message_type = file.instance.name.message_type
        _store(left, max(0, first - min(size, len(data))) if message_type else 0)
        return 1

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
            self._error(ERROR_INVALID_HANDLE)
            return None
        operation = Operation(kind, process, self.world.current, file, size)
        overlapped = getattr(overlapped, "_obj", overlapped)
        if overlapped is not None:
            address = ctypes.addressof(overlapped)
            before = self.started.get(address)
            if before and before.phase == "pending":
                self._broken("memory", f"{kind} uses the OVERLAPPED of a pending operation")
            operation.address = address
            operation.with_overlapped = weakref.ref(overlapped, self._overlapped_freed(operation))
            event = overlapped.hEvent
            if event:
                operation.packet_wanted = not event & 1
                operation.event = self._object(process, event & ~1, Event, kind)
                if operation.event:
                    operation.event.signaled = False
            self.started[address] = operation
            overlapped.Internal = PENDING
        file.signaled = False
        if kind == "read":
            self._watch_buffer(operation, buffer)
        elif kind == "write":
            operation.held = buffer
        return operation

    def _watch_buffer(self, operation: Operation, buffer: Any) -> None:
        buffer = getattr(buffer, "_obj", buffer)
        operation.buffer = weakref.ref(buffer, self._buffer_freed(operation))

    def _overlapped_freed(self, operation: Operation) -> Callable[[Any], None]:
        def freed(reference: Any) -> None:
            if self.started.get(operation.address) is operation:
                del self.started[operation.address]
            if operation.phase == "pending" and not operation.process.dead:
                self._broken("memory", f"OVERLAPPED of a pending {operation.kind} is freed")

        return freed

    def _buffer_freed(self, operation: Operation) -> Callable[[Any], None]:
        def freed(reference: Any) -> None:
            if operation.phase == "pending" and not operation.process.dead:
                self._broken("memory", f"buffer of a pending {operation.kind} is freed")

        return freed

    def _started(self, operation: Operation, status: int, count: Any) -> int:
        """Return from the call that began an operation."""
        if status == PENDING:
            return self._left_pending(operation, count)
        if status not in WARNINGS:
            # Internal stays at pending, the event is never set, and no packet comes.
            operation.phase = "failed at once"
            operation.held = None
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
        instance, queue = operation.file.instance, operation.queue
        if operation.kind == "connect":
            if operation in instance.connects:
                instance.connects.remove(operation)
        elif queue is None:
            pass
        elif operation.kind == "read":
            if operation in queue.reads:
                queue.reads.remove(operation)
        elif operation.kind == "flush":
            if operation in queue.flushes:
                queue.flushes.remove(operation)
        else:
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
        overlapped = operation.with_overlapped and operation.with_overlapped()
        if operation.kind == "read":
            self._fill_buffer(operation)
        elif was_pending and operation.held is not None:
            self._check_written(operation)
        operation.held = None
        if overlapped is not None:
            overlapped.InternalHigh = operation.count
            overlapped.Internal = operation.status
        if operation.kind != "flush":  # FlushFileBuffers has an event of its own inside
            self._signal(operation.event or file)
        self._wake(operation.waiters)
        if file.port and operation.address and operation.packet_wanted:
            packet = Packet(operation.status, operation.count, file.key, operation.address)
            packet.memory = operation.with_overlapped
            self._post(file.port, packet)

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
            seconds = self.world.delay("cancel")
            if seconds:
                self.world.later(seconds, partial(self._cancel, operation))
            else:
                self._cancel(operation)
        return self._result(0 if found else ERROR_NOT_FOUND)

    def _cancel(self, operation: Operation) -> None:
        if not operation.finished and not operation.process.dead:
            self._finish_withdrawn(operation, CANCELLED)

    def GetOverlappedResult(
        self, process: Process, handle: Any, overlapped: Any, count: Any, wait: int
    ) -> int:
        """Return how an operation ended, after waiting for that if told so."""
        return self._overlapped_result(
            process, handle, overlapped, count, math.inf if wait else 0.0, ERROR_IO_INCOMPLETE
        )

    def GetOverlappedResultEx(
        self,
        process: Process,
        handle: Any,
        overlapped: Any,
        count: Any,
        milliseconds: int,
        alertable: int,
    ) -> int:
        """Return how an operation ended, after waiting for that for some time."""
        seconds = math.inf if milliseconds == INFINITE else milliseconds / 1000
        error = WAIT_TIMEOUT if milliseconds else ERROR_IO_INCOMPLETE
        return self._overlapped_result(process, handle, overlapped, count, seconds, error)

    def RtlNtStatusToDosError(self, process: Process, status: int) -> int:
        """Return the Win32 error that an NTSTATUS stands for."""
        return ERRORS.get(status, ERROR_MR_MID_NOT_FOUND)

    def _overlapped_result(
        self,
        process: Process,
        handle: Any,
        overlapped: Any,
        count: Any,
        seconds: float,
        too_early: int,
    ) -> int:
        overlapped = getattr(overlapped, "_obj", overlapped)
        ended = overlapped.Internal != PENDING
        if ended and not _value(handle):  # no handle is needed any more
            file = None
        else:
            file = self._object(process, handle, File, "GetOverlappedResult")
            if not file:
                return self._result(ERROR_INVALID_HANDLE)
        if overlapped.Internal == PENDING:
            self._check_wait(self.started.get(ctypes.addressof(overlapped)), seconds)
            if not seconds:
                return self._result(ERROR_IO_INCOMPLETE)
            event = overlapped.hEvent
            waitable = self._object(process, event & ~1, Event, "wait") if event else file
            if not waitable:
                return self._result(ERROR_INVALID_HANDLE)
            deadline = self.world.now + seconds
            if not self._wait(waitable, deadline):
                return self._result(too_early)
        status = overlapped.Internal
        _store(count, overlapped.InternalHigh)
        # A number of the caller's own counts as success if its highest bit isn't set.
        return self._result(ERRORS.get(status, 0 if status < 2**31 else ERROR_MR_MID_NOT_FOUND))

    def _check_wait(self, operation: Operation | None, seconds: float) -> None:
        """Waiting for what failed at once is endless; a caller that can't know may try for once."""
        if operation is None:
            self._broken("wait", "a wait for an operation that was never started")
        elif operation.phase != "pending":
            operation.vain_waits += 1
            if seconds == math.inf or operation.vain_waits > 2:
                self._broken("wait", "a wait for an operation that isn't pending")

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

    def ResetEvent(self, process: Process, handle: Any) -> int:
        """Reset an event."""
        event = self._object(process, handle, Event, "ResetEvent")
        if not event:
            return self._result(ERROR_INVALID_HANDLE)
        event.signaled = False
        return 1

    def WaitForSingleObject(self, process: Process, handle: Any, milliseconds: int) -> int:
        """Wait for a signal."""
        waitable = self._object(process, handle, Waitable, "WaitForSingleObject")
        if not waitable:
            self._error(ERROR_INVALID_HANDLE)
            return WAIT_FAILED
        busy = True
        if isinstance(waitable, Event):
            busy = waitable.users > 0
        elif isinstance(waitable, File):
            busy = bool(waitable.operations)
        if not waitable.signaled and not busy:
            self._broken("wait", "a wait for a signal that nothing pending will give")
        return 0 if self._wait(waitable, self._after(milliseconds)) else WAIT_TIMEOUT

    def _wait(self, waitable: Waitable, deadline: float) -> bool:
        if not self._block_until(lambda: waitable.signaled, waitable.waiters, deadline):
            return False
        if not waitable.manual_reset:
            waitable.signaled = False
        return True

    # https://learn.microsoft.com/windows/win32/fileio/i-o-completion-ports

    def CreateIoCompletionPort(
        self, process: Process, handle: Any, port: Any, key: Any, threads: int
    ) -> int:
        """Make a port, or have a file's operations report to one, or both."""
        value = _value(handle)
        if value == INVALID_HANDLE_VALUE:
            if _value(port):
                self._error(ERROR_INVALID_PARAMETER)
                return 0
            return self._new_handle(process, Port())
        file = self._object(process, handle, File, "CreateIoCompletionPort")
        if not file:
            return self._error(ERROR_INVALID_HANDLE)
        if file.port or not file.overlapped:
            return self._error(ERROR_INVALID_PARAMETER)
        if not _value(port):
            target, value = Port(), 0
            value = self._new_handle(process, target)
        else:
            value = _value(port)
            target = self._object(process, port, Port, "CreateIoCompletionPort")
            if not target:
                return self._error(ERROR_INVALID_HANDLE)
        file.port = target
        file.key = _number(key)
        return value

    def _post(self, port: Port, packet: Packet) -> None:
        if not port.closed:
            port.packets.append(packet)
            self._wake(port.waiters)

    def PostQueuedCompletionStatus(
        self, process: Process, port: Any, count: int, key: Any, overlapped: Any
    ) -> int:
        """Add a packet of one's own."""
        target = self._object(process, port, Port, "PostQueuedCompletionStatus")
        if not target:
            return self._result(ERROR_INVALID_HANDLE)
        overlapped = getattr(overlapped, "_obj", overlapped)
        address = 0 if overlapped is None else ctypes.addressof(overlapped)
        self._post(target, Packet(SUCCESS, _number(count), _number(key), address))
        return 1

    def GetQueuedCompletionStatus(
        self,
        process: Process,
        port: Any,
        count: Any,
        key: Any,
        overlapped: Any,
        milliseconds: int,
    ) -> int:
        """Take the next packet, or wait for one."""
        target = self._object(process, port, Port, "GetQueuedCompletionStatus")
        _store_pointer(overlapped, 0)
        if not target:
            return self._result(ERROR_INVALID_HANDLE)
        queue: Port = target
        deadline = self._after(milliseconds)
        if not self._block_until(
            lambda: bool(queue.packets) or queue.closed, queue.waiters, deadline
        ):
            return self._result(WAIT_TIMEOUT)
        if queue.closed:
            return self._result(ERROR_ABANDONED_WAIT_0)
        packet = queue.packets.popleft()
        if packet.memory is not None and packet.memory() is None:
            self._broken("memory", "an OVERLAPPED is freed before its packet is taken")
        _store(count, packet.count)
        _store(key, packet.key)
        _store_pointer(overlapped, packet.address)
        return self._result(ERRORS[packet.status])

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
        address = 0x10000 + 16 * (len(process.descriptors) + 1)
        process.descriptors[address] = parsed
        _store_pointer(descriptor, address)
        return 1

    def LocalFree(self, process: Process, memory: Any) -> int:
        """Free what ConvertStringSecurityDescriptorToSecurityDescriptorW made."""
        if process.descriptors.get(_value(memory)) is None:
            self._broken("memory", "LocalFree of what isn't allocated")
            return _value(memory)
        process.descriptors[_value(memory)] = None
        return 0


def _ignore(process: Process, instance: Instance) -> None:
    """Nobody wants to know who opens a pipe."""


# ---- Names, numbers and memory ------------------------------------------------------------------


def _value(handle: Any) -> int:
    """Return a handle's or a pointer's value as a number."""
    value = getattr(handle, "value", handle)
    if not isinstance(value, int):
        return 0
    return value & INVALID_HANDLE_VALUE


def _number(value: Any) -> int:
    return int(getattr(value, "value", value) or 0)


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


def _store_pointer(target: Any, address: int) -> None:
    target = getattr(target, "_obj", target)
    if target is not None:
        ctypes.c_void_p.from_buffer(target).value = address or None


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


def _wanted(access: int) -> int:
    """Return the rights that an access mask asks for; npfs takes bit 4 from a client's open."""
    wanted = access & (FILE_READ_DATA | FILE_WRITE_DATA)
    if access & (GENERIC_READ | GENERIC_ALL):
        wanted |= FILE_READ_DATA
    if access & (GENERIC_WRITE | GENERIC_ALL):
        wanted |= FILE_WRITE_DATA
    return wanted


def _parse_sddl(text: str) -> Descriptor:
    """Read the DACL of a security descriptor's text; a ValueError's text is Win32's error."""
    match = _SDDL.fullmatch(text)
    if match is None or (text and not re.match("[OGDS]:", text)):
        raise ValueError(str(ERROR_INVALID_PARAMETER if ":" not in text[:2] else ERROR_INVALID_ACL))
    if "D:" not in text:
        return Descriptor()
    entries = []
    for kind, _flags, rights, _object, _inherited, trustee in _ACE.findall(match.group(2) or ""):
        if kind not in ("A", "D") or (trustee not in _TRUSTEES and not trustee.startswith("S-1-")):
            raise ValueError(str(ERROR_INVALID_ACL))
        entries.append((kind, _parse_rights(rights), trustee))
    return Descriptor(entries)


def _parse_rights(text: str) -> int:
    if text.startswith("0x"):
        mask = int(text, 16)
        return (mask & ALL_RIGHTS) | (ALL_RIGHTS if mask & GENERIC_ALL else 0)
    rights = 0
    for place in range(0, len(text), 2):
        if text[place : place + 2] not in _RIGHTS:
            raise ValueError(str(ERROR_INVALID_ACL))
        rights |= _RIGHTS[text[place : place + 2]]
    return rights


class _SecurityAttributes(ctypes.Structure):
    """SECURITY_ATTRIBUTES, of which CreateNamedPipeW gets the address."""

    _fields_ = [
        ("nLength", ctypes.c_uint32),
        ("lpSecurityDescriptor", ctypes.c_void_p),
        ("bInheritHandle", ctypes.c_int32),
    ]


def _descriptor(process: Process, attributes: Any) -> Descriptor:
    """Return the descriptor that a SECURITY_ATTRIBUTES leads to."""
    attributes = getattr(attributes, "_obj", attributes)
    if attributes is None:
        return Descriptor()
    read = _SecurityAttributes.from_buffer_copy(attributes)
    found = process.descriptors.get(read.lpSecurityDescriptor or 0)
    return found if isinstance(found, Descriptor) else Descriptor()
