"""Mistakes of concurrency and interruption, to be planted in vmshim.py one at a time.

Data for .ci/mutate.py; `.ci/simulate.py --mistakes` shows for each after how many runs the
simulation finds it. Each is a name, a text of vmshim.py, and what replaces it.
"""

from __future__ import annotations

from typing import NamedTuple


class Mistake(NamedTuple):
    """A rule, and what to replace by what in order to break it."""

    rule: str
    old: str
    new: str
    deep: bool = False  # whether it takes the deep mode to find it


MISTAKES: list[Mistake] = [
    # One operation.
    Mistake(
        "what is cancelled is waited for",
        "            while self.is_pending():\n                self.wait(_LONGEST_WAIT)\n",
        "            while self.is_pending() and not cancelled:\n"
        "                self.wait(_LONGEST_WAIT)\n",
    ),
    Mistake(
        "what ends by itself while it is cancelled is waited for",
        "            while self.is_pending():\n                self.wait(_LONGEST_WAIT)\n",
        "            while self.is_pending() and cancelled:\n"
        "                self.wait(_LONGEST_WAIT)\n",
    ),
    Mistake(
        "what is waited for is cancelled first",
        "            cancelled = _kernel32.CancelIoEx(self.handle, self.overlapped)\n",
        "            cancelled = True\n",
    ),
    Mistake(
        "what failed at once is never waited for",
        "        self.overlapped.Internal = _NOT_STARTED\n",
        "",
    ),
    Mistake(
        "what may have failed at once is not waited for without end",
        "                if not (cancelled or self._is_started):\n                    break\n",
        "",
    ),
    Mistake(
        "a wait that ran out is no end",
        "            while error == ERROR_IO_PENDING:\n",
        "            if error == ERROR_IO_PENDING:\n",
    ),
    Mistake(
        "however it is left, an operation is ended",
        "        finally:\n            operation.end()\n            operation.release()\n",
        "        finally:\n            operation.release()\n",
    ),
    Mistake(
        "an operation that has ended is forgotten",
        "        _under_way.pop(self.address, None)\n\n    def release",
        "\n    def release",
    ),
    Mistake(
        "a deadline ends an operation",
        "                timed_out = seconds <= 0\n",
        "                timed_out = False\n",
    ),
    Mistake(
        "each operation at a time has a signal of its own",
        "            if self._operations[0] is not operation:\n",
        "            if self.closed:\n",
    ),
    Mistake(
        "each operation has an OVERLAPPED of its own",
        "        self.overlapped = OVERLAPPED(Internal=_NOT_STARTED)\n",
        "        self.overlapped = handle.__dict__.setdefault('shared', OVERLAPPED())\n",
    ),
    Mistake(
        "the buffer lives as long as the operation",
        "        self.arguments = arguments\n",
        "        self.arguments = tuple(\n"
        "            type(a)() if isinstance(a, ctypes.Array) else a for a in arguments\n"
        "        )\n",
    ),
    # A pipe.
    Mistake(
        "close() ends what is under way",
        "            operation.end()\n            # Ctrl-C may have kept",
        "            # Ctrl-C may have kept",
    ),
    Mistake(
        "close() skips nothing that is under way",
        "        for operation in list(self._operations):\n            operation.end()\n",
        "        for operation in self._operations:\n            operation.end()\n",
    ),
    Mistake(
        "close() closes the handle though a flush has failed",
        "            if operation.thread == _thread.get_ident():\n"
        "                operation.release()\n",
        "",
    ),
    Mistake(
        "close() closes the handle",
        "        self._handle = None\n\n    def _open",
        "\n    def _open",
    ),
    Mistake(
        "a handle is closed once",
        "        # This closes the handle, unless another thread's operation still has it.\n"
        "        self._handle = None\n",
        "        if self._handle is not None:\n"
        "            ctypes.WinDLL('kernel32').CloseHandle(self._handle)\n"
        "        self._handle = None\n",
    ),
    Mistake(
        "a flush is cancelled again and again",
        "        while self._begun and not self._done and not sys.is_finalizing():\n"
        "            # Again",
        "        if self._begun and not self._done:\n            # Again",
    ),
    Mistake(
        "a queue is asked in vain before it is waited for",
        "    for timeout in 0, seconds:\n",
        "    for timeout in (seconds,):\n",
    ),
    Mistake(
        "a flush ends with the deadline",
        "                if not has_ended and time.monotonic() >= self.deadline:\n",
        "                if False:\n",
    ),
    Mistake(
        "a refusal that came before all was read is read",
        "        response = _read_response(pipe, max_response)\n"
        "        if not response:\n"
        "            raise\n"
        "        return response\n",
        "        raise\n",
    ),
    Mistake(
        "a client closes on every path",
        "        with dial_pipe(pipe_path, connect_timeout=connect_timeout, "
        "timeout=timeout) as pipe:\n",
        "        pipe = dial_pipe(pipe_path, connect_timeout=connect_timeout, "
        "timeout=timeout)\n"
        "        sys.modules.setdefault('pipes', []).append(pipe)\n"
        "        if pipe:\n",
    ),
    Mistake(
        "busy is tried no longer than allowed",
        "error != ERROR_PIPE_BUSY or seconds <= 0",
        "error != ERROR_PIPE_BUSY or seconds <= -3",
    ),
    Mistake(
        "a request is never repeated",
        "            response = _exchange(pipe, message, max_response)\n",
        "            try:\n"
        "                response = _exchange(pipe, message, max_response)\n"
        "            except OutcomeUnknownError:\n"
        "                with dial_pipe(pipe_path, timeout=timeout) as pipe:\n"
        "                    response = _exchange(pipe, message, max_response)\n",
    ),
    # The handler's thread.
    Mistake(
        "the handler comes before success",
        "            if client is not None:\n"
        "                self._responses.put((client, "
        "self._call_handler(client.request)))\n",
        "            if client is not None:\n"
        "                self._responses.put((client, SHIM_SUCCESS))\n"
        "                self._wake()\n"
        "                self._call_handler(client.request)\n",
    ),
    Mistake(
        "the handler has one request at a time",
        "                self._responses.put((client, self._call_handler(client.request)))\n",
        "                import _thread\n"
        "\n"
        "                _thread.start_new_thread(\n"
        "                    lambda: self._responses.put(\n"
        "                        (client, self._call_handler(client.request))\n"
        "                    ),\n"
        "                    (),\n"
        "                )\n",
    ),
    Mistake(
        "a response wakes the I/O thread",
        "                self._wake()\n        self._write_log()\n",
        "        self._write_log()\n",
    ),
    Mistake(
        "who leaves the handler wakes the I/O thread",
        "        self._handler_has_left = True\n        self._wake()\n",
        "        self._handler_has_left = True\n",
    ),
    Mistake(
        "who leaves says so before the wake-up",
        "        self._handler_has_left = True\n        self._wake()\n",
        "        self._wake()\n        self._handler_has_left = True\n",
    ),
    Mistake(
        "serve_forever() waits for its I/O thread",
        "            service.leave_handler()\n            service.join()\n",
        "            service.leave_handler()\n",
    ),
    Mistake(
        "a thread that couldn't start isn't waited for",
        "        while self._has_begun and not self._has_ended and not sys",
        "        while not self._has_ended and not sys",
    ),
    Mistake(
        "shutdown() wakes the I/O thread",
        'unless the handler calls this."""\n        self._wake()\n',
        'unless the handler calls this."""\n',
    ),
    Mistake(
        "close() in the handler doesn't wait for itself",
        "            if self._is_in_handler():\n                return\n",
        "",
    ),
    # The I/O thread.
    Mistake(
        "what was answered before the handler left isn't lost",
        "        while not self._responses.empty():\n"
        "            self._resume(*self._responses.get())\n"
        "        if handler_has_left:\n",
        "        if handler_has_left:\n"
        "            for client in list(self._at_handler):\n"
        "                self._resume(client, None)\n"
        "        while not self._responses.empty():\n"
        "            self._resume(*self._responses.get())\n"
        "        if handler_has_left:\n",
    ),
    Mistake(
        "a client is answered once",
        "        self._at_handler.remove(client)\n",
        "        self._at_handler[-1:] = []\n",
    ),
    Mistake(
        "a client that is late is cut off",
        "            client, _ = self._deadlines.popitem(last=False)\n"
        "            client.cut_off()\n",
        "            client, _ = self._deadlines.popitem(last=False)\n",
    ),
    Mistake(
        "the oldest deadline comes first",
        "        self._deadlines.pop(client, None)\n        seconds = self._server",
        "        seconds = self._server",
    ),
    Mistake(
        "the bound is exact",
        "self._connected < self._server.max_clients",
        "self._connected <= self._server.max_clients",
    ),
    Mistake(
        "nobody is let in while a request waits",
        "            and len(self._at_handler) <= 1",
        "            and len(self._at_handler) <= 3",
    ),
    Mistake(
        "who leaves makes room",
        "        self._connected -= client.is_connected\n",
        "",
    ),
    Mistake(
        "the door is open again after a client",
        "        if self._offered is client:\n"
        "            self._offered = None\n"
        "        # ERROR_NO_DATA",
        "        # ERROR_NO_DATA",
    ),
    Mistake(
        "a client that is there before ConnectNamedPipe doesn't close the door",
        "            while self._may_let_in() and not self._offered and",
        "            if self._may_let_in() and not self._offered and",
    ),
    Mistake(
        "a client faster than ConnectNamedPipe is welcome",
        "        if client.is_used_up or error not in (0, ERROR_PIPE_CONNECTED):\n",
        "        if client.is_used_up or error:\n",
    ),
    Mistake(
        "a server that stops uses the offered instance up",
        "            if self._offered and not self._may_let_in():\n",
        "            if self._offered and not self._may_let_in() and not self._is_stopping:\n",
    ),
    Mistake(
        "a completion belongs to its operation",
        "        operation, client, task = self._operations.pop(overlapped.value)\n",
        "        operation, client, task = self._operations.pop(next(iter(self._operations)))\n",
    ),
    Mistake(
        "the server lets go of an operation that has ended",
        "        client.operations.remove(operation)\n"
        "        operation.end()\n"
        "        self._advance(client, task, (operation.error(), count.value))\n",
        "        client.operations.remove(operation)\n"
        "        self._advance(client, task, (operation.error(), count.value))\n",
    ),
    Mistake(
        "cutting off cancels",
        "            _kernel32.CancelIoEx(self.handle, operation.overlapped)\n",
        "            pass\n",
    ),
    Mistake(
        "a client that has gone is forgotten",
        "        self._clients.discard(client)\n",
        "",
    ),
    Mistake(
        "a server that stops gives its clients little time",
        "            seconds = _STOP_GRACE if seconds is None else min(seconds, _STOP_GRACE)\n",
        "            pass\n",
    ),
    Mistake(
        "a failed client lets its connection go",
        '("debug", "a client has failed: Win32 error %s", error.winerror)',
        '("debug", "a client has failed: %s", error)',
    ),
    Mistake(
        "a refusal is followed by a close",
        "            if not is_leaving:\n                client.cut_off()\n",
        "            if self._is_stopping:\n                client.cut_off()\n",
    ),
    Mistake(
        "the success is read before the end of file is sent",
        "            0,\n            0,\n            0,\n            security,\n",
        "            4096,\n            4096,\n            0,\n            security,\n",
    ),
    Mistake(
        "a success ends in end of file",
        '                yield from self._write(client, b"")\n',
        "",
    ),
    Mistake(
        "a client that came early isn't lost",
        "            self.came_early.append(instance)\n",
        "",
    ),
    Mistake(
        "nobody else can connect to the name's keeper",
        "        while not self.use_up():\n"
        "            self.came_early.append(instance)\n"
        "            instance = self.create()\n",
        "",
    ),
    Mistake(
        "the first instance is the first",
        "self._create(FILE_FLAG_FIRST_PIPE_INSTANCE, security)",
        "self._create(0, security)",
    ),
    Mistake(
        "the end of the I/O thread ends serve_forever()",
        "            self._has_ended = True\n            self._requests.put(None)\n",
        "            self._requests.put(None)\n",
    ),
    Mistake(
        "a server that is closed while it serves gives its name up",
        "                if server._closed:\n                    server._listener.close()\n",
        "",
    ),
    Mistake(
        "what the I/O thread has entered it removes",
        "                server._serving.clear()\n",
        "                pass\n",
    ),
]
