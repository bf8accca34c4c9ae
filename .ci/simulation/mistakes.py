"""Mistakes of concurrency and interruption, to be planted in vmshim.py one at a time.

`.ci/simulate.py --mistakes` shows for each after how many runs the simulation finds it. TABLE has
them: the rule, and then the text of vmshim.py that keeps it (it is there once), and what replaces
it: as old  =>  new where both are in one line, or else as lines with a - and lines with a +, behind
which the text is as it is. [deep] takes the deep mode.
"""

from __future__ import annotations

from typing import NamedTuple

TABLE = r"""
# One operation.
what is cancelled is waited for
-        while self.is_pending() and waits > 0:
-            time.sleep(0.001)
-            waits -= 1
what failed at once is never waited for
-            overlapped.Internal = _NOT_STARTED
-            self._failure
+            self._failure
what may have failed at once is not waited for without end
    waits = math.inf if is_known else 100  =>  waits = math.inf
what may be ending is waited for
    waits = math.inf if is_known else 100  =>  waits = math.inf if is_known else 0
an operation that has ended is forgotten
-        _under_way.pop(ctypes.addressof(self.overlapped), None)
what is under way is kept, whatever Ctrl-C cuts short
    _under_way[ctypes.addressof(overlapped)] = overlapped,  =>  _ = overlapped,
each operation has an OVERLAPPED of its own
-        self.overlapped = OVERLAPPED(Internal=_NOT_STARTED)
+        self.overlapped = sys.modules.setdefault('o', OVERLAPPED(Internal=_NOT_STARTED))
a signal may be another operation's
    if self.is_pending() and not is_timeout:  =>  if False:
no handle lies in a local variable
    self._handle = owner._handle  =>  handle = self._handle = owner._handle
a wait is short enough for Ctrl-C
    operation.wait(min(_LONGEST_WAIT, seconds))  =>  operation.wait(min(5.0, seconds))

# A pipe and a client.
a deadline ends an operation
    is_late = seconds <= 0  =>  is_late = False
what ended by itself is no timeout
    if is_late and error == ERROR_OPERATION_ABORTED:  =>  if is_late:
close() closes the handle
-            # This closes the handle, unless another thread's operation still has it.
-            self._handle = None
+            pass
a pipe that was closed goes on with nothing
    if is_late or self.closed:  =>  if is_late:
an operation that close() has ended is no failure
-        self._check_open()  # another thread may have closed the pipe
a refusal that came before all was read is read
-        response = _read_response(pipe, max_response)
-        if not response:
-            raise
+        raise
a client closes on every path
-        with dial_pipe(pipe_path, connect_timeout=connect_timeout, timeout=timeout) as pipe:
+        pipe = dial_pipe(pipe_path, connect_timeout=connect_timeout, timeout=timeout)
+        sys.modules.setdefault('pipes', []).append(pipe)
+        if pipe:
a traceback keeps no connection open [deep]
    pipe.close()  # the traceback would keep it open  =>  pass
busy is tried no longer than allowed
    error != ERROR_PIPE_BUSY or seconds <= 0  =>  error != ERROR_PIPE_BUSY or seconds <= -3
a request is never repeated
-            _exchange(pipe, request.to_json(), max_response)
+            try:
+                _exchange(pipe, request.to_json(), max_response)
+            except OutcomeUnknownError:
+                with dial_pipe(pipe_path, timeout=timeout) as pipe:
+                    _exchange(pipe, request.to_json(), max_response)
who timed out in line is told so
    raise ShimBusyError(*ShimBusyError._means, pipe.name, WAIT_TIMEOUT) from None  =>  raise
where the object fills a buffer nobody is sure
-        if rest == 0 and blocks & (blocks + 1) == 0:
-            raise
the newline isn't part of the object
    divmod(len(message) - len(b"\n"), 512)  =>  divmod(len(message), 512)
a buffer grows to twice its size and 512
    blocks & (blocks + 1) == 0  =>  blocks == 1
a timeout of the response is unknown
-        pipe.write(message)
-    except ResponseTimeoutError:
+        pipe.write(message)
+        if pipe.deadline < math.inf:
+            pipe.read(0)
+            _read_response(pipe, max_response)
+    except ResponseTimeoutError:

# The handler.
a request is carried out once
-        response = self._call_handler(client.request)
+        response = self._call_handler(client.request) and self._call_handler(client.request)
the handler comes before success
-        response = self._call_handler(client.request)
+        client.respond(SHIM_SUCCESS)
+        response = self._call_handler(client.request)
who has gone is not carried out
    if not client.is_there():  =>  if False:
a read is always under way
-                self._server._waiting.append(self)
-        self._read()
+                self._server._waiting.append(self)
+                return
+        self._read()
who comes first is handled first
    self._waiting.pop(0)  =>  self._waiting.pop()
the client before may take its response first
    while client.step == "respond" and time.perf_counter() < give_up:  =>  while False:
a courtesy is short
    _COURTESY = 0.01  =>  _COURTESY = 0.1
the handler's time doesn't count
    other.deadline += time.monotonic() - began  # nobody could be attended to  =>  pass
shutdown() in the handler doesn't wait for itself
    not (is_here or sys.is_finalizing())  =>  not sys.is_finalizing()
a refusal arrives byte for byte
    bytes(refusal.response) or refusal.message  =>  refusal.message
a refusal's newlines stay
    refusal.message.encode(  =>  refusal.message.rstrip().encode(
what can't be sent is replaced
-    return response if response not in (b"", SHIM_SUCCESS) else b"the handler gave no text"
+    return response

# The loop.
what has ended is taken before deadlines are judged
-        for client in list(self._clients):
-            client.advance()
-        now = time.monotonic()
-        for client in [client for client in self._clients if client.deadline <= now]:
-            client.give_up()
+        now = time.monotonic()
+        for client in [client for client in self._clients if client.deadline <= now]:
+            client.give_up()
+        for client in list(self._clients):
+            client.advance()
nobody waits who has started an operation since the last look
-        if self._has_begun:
-            return
a look takes note that it has looked
-        self._has_begun = False
-        for
+        for
a wait ends when a client's time is over
-        seconds = max(0.0, min(seconds, deadline - time.monotonic()))
+        seconds = max(0.0, min(seconds, deadline))
a request is complete only when its message is wholly read
    elif is_complete and read.error() != ERROR_MORE_DATA:  =>  elif is_complete:
a request that is answered is forgotten
-        self.request = None
-        data = self._response
+        data = self._response
who takes success and doesn't leave holds nobody up
    any(client.step == "connect" for client  =>  any(client.step in ("connect", "leave") for client
a descriptor lives as long as what refers to it
    attributes.descriptor = descriptor  # keeps the memory as long as the attributes  =>  pass
a server outlives an instance that it is refused
-            self._pause_offers(error.winerror)
-            client.drop()
+            client.drop()
+            raise
what is no request is refused
    client.respond(str(error).encode("utf-8", "backslashreplace"))  =>  client.respond(SHIM_SUCCESS)
busy is tried as long as allowed
    give_up = _deadline(connect_timeout)  =>  give_up = _deadline((connect_timeout or 9) / 2)
the bound is exact
    len(self._clients) >= self.max_clients  =>  len(self._clients) > self.max_clients
one instance is offered at a time
    if is_full or is_offered or time  =>  if is_full or time
a client faster than ConnectNamedPipe is welcome
    if error in (0, ERROR_MORE_DATA, ERROR_PIPE_CONNECTED):  =>  if error in (0, ERROR_MORE_DATA):
a client that has gone is forgotten
    clients.remove(self)  =>  pass
dropping a client ends what is under way
-        for operation in list(self._operations):
-            operation.end()
dropping a client closes its instance
-        self._handle = None  # the last reference: this closes the handle
a success ends in end of file
    self._begin(self._was_told, _kernel32.WriteFile, b"", 0, None)  =>  self._was_told(_)
a refusal ends in a close
-        else:
-            self.drop()
-
-    def _was_told
+
+    def _was_told
a client that doesn't leave is cut off
-        self.step = "leave"
-        self.deadline = _deadline(self._server.request_timeout)
+        self.step = "leave"
+        self.deadline = math.inf
a client that doesn't read is cut off
-        self.step = "respond"
-        self.deadline = _deadline(self._server.request_timeout)
+        self.step = "respond"
+        self.deadline = math.inf
a client that is silent is cut off
-        self.step = "send"
-        self.deadline = _deadline(self._server.request_timeout)
+        self.step = "send"
who is too late is told so
    self.respond(b"no complete request came in time")  =>  self.drop()
what a client sends is bounded
    if len(self.received) > MAX_REQUEST:  =>  if False:
what comes after too long a request is read
-                self.respond(b"the request is longer than %d bytes" % MAX_REQUEST)
+                self.respond(b"the request is longer than %d bytes" % MAX_REQUEST)
+                return
the buffers are 0
    PIPE_UNLIMITED_INSTANCES, 0, 0, 0  =>  PIPE_UNLIMITED_INSTANCES, 4096, 4096, 0

# Beginning and end.
shutdown() wakes the server
-        _kernel32.SetEvent(self._event)
shutdown() says it before it wakes the server
-        self._is_stopping = True
-        _kernel32.SetEvent(self._event)
+        _kernel32.SetEvent(self._event)
+        self._is_stopping = True
shutdown() waits for its own run
    self._runs.get("run") is run and  =>  self._runs.get("run") and
shutdown() waits for the run
    while run and self._runs  =>  while False and self._runs
a run that follows isn't stopped by the last one's call
-        self._is_stopping = False
-        self._runs.clear()
+        self._runs.clear()
a server that is closed while it serves gives its name up
-        self._runs.clear()
-        if self._is_closed:
-            self._release()
+        self._runs.clear()
who waits is told that the server stops
-        if self.step in ("send", "wait"):
-            self.respond(_STOPPED)
-        elif
+        if
a server that stops gives its clients time
-        elif self.step != "respond":
-            self.drop()
-        self.deadline = min
+        else:
+            self.drop()
+        self.deadline = min
... but little time
    self.deadline = min(self.deadline, time.monotonic() + _STOP_GRACE)  =>  pass
Ctrl-C gives its clients time, too
-            self._is_stopping = True
-            self._serve()
-            raise
+            raise
a run that was cut short is ended by whoever comes next
-        self._end()
-        return False
+        return False
the end of a run drops its clients
-        for client in list(self._clients):
-            client.drop()
-        self._is_stopping
+        self._is_stopping
the first instance is the first
    FILE_FLAG_FIRST_PIPE_INSTANCE if attributes else 0  =>  0
a client that came early isn't lost
-            self._came_early.append(self._handle)
nobody else can connect to the name's keeper
-        while not self._use_up_instance():
-            self._came_early.append(self._handle)
+        while False:
nobody else may open the pipe
-_DEFAULT_SECURITY = "D:P(A;;GA;;;SY)(A;;GA;;;BA)(A;;GA;;;OW)"
+_DEFAULT_SECURITY = "D:P(A;;GA;;;SY)(A;;GA;;;BA)(A;;GR;;;WD)"
nobody waits for the response to what was not sent
    raise  # the shim is still there, and waits for the request  =>  pass
what a second Ctrl-C cuts short is ended all the same
    operation.end()  # a second Ctrl-C has cut that short  =>  pass
"""


class Mistake(NamedTuple):
    """A rule, and what to replace by what in order to break it."""

    rule: str
    old: str
    new: str
    is_deep: bool


def _read_table() -> list[Mistake]:
    found: list[Mistake] = []
    rule, old, new = "", [""], [""]
    for line in [*TABLE.splitlines(), "the end"]:
        if line.startswith("-"):
            old.append(line[1:])
        elif line.startswith("+"):
            new.append(line[1:])
        elif line.startswith("    "):
            old, new = ([part] for part in line.strip().split("  =>  "))
        elif line and not line.startswith("#"):
            if old:
                name = rule.replace(" [deep]", "")
                found.append(Mistake(name, "\n".join(old), "\n".join(new), name != rule))
            rule, old, new = line, [], []
    return found[1:]


MISTAKES = _read_table()
