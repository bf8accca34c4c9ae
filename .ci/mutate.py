"""Break each rule of the protocol in vmshim.py, one at a time, and see the suite fail each time.

`python3 .ci/mutate.py` takes some minutes; `--only REGEX` tries some. A rule that can be broken
unnoticed is printed as SURVIVED, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
FILES = ("test_vmshim.py", "README.md", "setup.cfg")
SUITE = ("test_vmshim.py", "--failfast", "--verbose")


class Edit(NamedTuple):
    """A rule, and what in vmshim.py to replace by what in order to break it."""

    rule: str
    old: str
    new: str
    excuse: str = ""  # why Wine can't show it


EDITS = [
    # The client's side of an exchange.
    Edit("open for reading and writing", "GENERIC_READ | GENERIC_WRITE,", "GENERIC_READ,"),
    Edit(
        "open with share 0",
        "GENERIC_READ | GENERIC_WRITE,\n            0,",
        "GENERIC_READ | GENERIC_WRITE,\n            3,",
    ),
    Edit("open what exists", "OPEN_EXISTING = 3", "OPEN_EXISTING = 4"),
    Edit("open overlapped", "FILE_FLAG_OVERLAPPED | SECURITY_SQOS", "SECURITY_SQOS"),
    Edit("open with SQOS", "SECURITY_SQOS_PRESENT | SECURITY_ANONYMOUS", "SECURITY_ANONYMOUS"),
    Edit("the server can't impersonate", "SECURITY_ANONYMOUS = 0x0", "SECURITY_ANONYMOUS = 0x2"),
    Edit("busy is tried again", "if handle.error != ERROR_PIPE_BUSY or", "if True or"),
    Edit(
        "busy is tried for 2 s",
        "dial_pipe(path: str, *, timeout: float | None = 2.0)",
        "dial_pipe(path: str, *, timeout: float | None = 1.0)",
    ),
    Edit(
        "a request tries for 2 s",
        "connect_timeout: float | None = 2.0,\n    timeout: float | None = None,\n    max_response",
        "connect_timeout: float | None = 1.0,\n    timeout: float | None = None,\n    max_response",
    ),
    Edit(
        "busy is tried no longer than allowed",
        "!= ERROR_PIPE_BUSY or seconds <= 0",
        "!= ERROR_PIPE_BUSY or seconds <= -3",
    ),
    Edit(
        "any other error is final",
        "error != ERROR_PIPE_BUSY or seconds",
        "error not in (2, ERROR_PIPE_BUSY) or seconds",
    ),
    Edit("a request ends in a newline", r"{_go_string(self.op)}}}\n", r"{_go_string(self.op)}}}"),
    Edit(
        "ID comes before Op",
        r'"ID":{_go_string(self.id)},"Op":{_go_string(self.op)}',
        r'"Op":{_go_string(self.op)},"ID":{_go_string(self.id)}',
    ),
    Edit(
        "a request is one write",
        "            pipe.write(message)\n",
        "            pipe.write(message[:9]), pipe.write(message[9:])\n",
    ),
    Edit("< > & are escaped", '*b"<>&", ', ""),
    Edit("U+2028 and U+2029 are escaped", ", 0x2028, 0x2029)", ")"),
    Edit("control characters are escaped", "(*range(0x20), ", "("),
    Edit("hexadecimal digits are small", r"\\u{code:04x}", r"\\u{code:04X}"),
    Edit(
        "tab, newline, return have short escapes", r"""'\t\n\r"\\', 'tnr"\\'""", r"""'"\\', '"\\'"""
    ),
    Edit(
        "other characters are raw UTF-8",
        "return f'\"{text.translate(_GO_ESCAPES)}\"'",
        "return json.dumps(text).replace('<', '\\\\u003c')",
    ),
    Edit(
        "an answer is read to end of file",
        "        response += chunk\n",
        "        response += chunk\n        break\n",
    ),
    Edit(
        "success is not a byte more",
        "if response == SHIM_SUCCESS:",
        "if response.startswith(SHIM_SUCCESS):",
    ),
    Edit(
        "success is not a byte less",
        "if response == SHIM_SUCCESS:",
        "if response.rstrip(b'\\0') == SHIM_SUCCESS.rstrip(b'\\0'):",
    ),
    Edit(
        "success begins with a zero byte", 'SHIM_SUCCESS = b"\\0OK\\0"', 'SHIM_SUCCESS = b"OK\\0"'
    ),
    Edit(
        "an error's text is UTF-8",
        'response.decode("utf-8", "replace")',
        'response.decode("latin-1")',
    ),
    Edit(
        "an error's text may be broken", 'response.decode("utf-8", "replace")', "response.decode()"
    ),
    Edit("nothing is an unknown failure", '"unknown shim failure"', '"no answer"'),
    Edit(
        "an answer has a limit",
        "while len(response) <= limit:\n        chunk = pipe.read(min(limit + 1 - len(response), 65536))",
        "while True:\n        chunk = pipe.read(65536)",
    ),
    Edit("a failure kills the process", "    process.kill()\n", ""),
    Edit("a failure reaps the process", "return process.wait()", "return 1"),
    Edit(
        "an unread answer kills the process",
        "        if process is not None:\n            _kill(process)\n        raise",
        "        raise",
    ),
    Edit("an empty answer tells the exit code", 'f", exit code {exit_code}"', '""'),
    Edit(
        "success leaves the process alone",
        "    try:\n        response = _read_response(pipe, max_response)\n",
        "    try:\n        response = _read_response(pipe, max_response)\n        if process is not None:\n            _kill(process)\n",
    ),
    Edit(
        "the client closes on every path",
        "with dial_pipe(pipe_path, timeout=connect_timeout) as pipe:",
        "pipe = _kept = dial_pipe(pipe_path, timeout=connect_timeout)\n        globals().setdefault('_leak', []).append(_kept)\n        if True:",
    ),
    Edit("an unknown op is not sent", "if not isinstance(self.op, VMRequestOp):", "if False:"),
    Edit("an empty ID is not sent", "        if not self.id:\n", "        if False:\n"),
    Edit("the client checks first", "    request.check()\n    message", "    message"),
    Edit(
        "a request is never repeated",
        "            check_shim_response(pipe, max_response=max_response)\n",
        "            try:\n                check_shim_response(pipe, max_response=max_response)\n            except OSError:\n                dial_pipe(pipe_path).write(message)\n                raise\n",
    ),
    # The server's side.
    Edit("the pipe has messages", "PIPE_TYPE_MESSAGE |", "0 |"),
    Edit("the pipe is read as bytes", "PIPE_READMODE_BYTE |", "2 |"),
    Edit("remote clients are rejected", "| PIPE_REJECT_REMOTE_CLIENTS", ""),
    Edit(
        "the first instance is the first",
        "_create_instance(FILE_FLAG_FIRST_PIPE_INSTANCE)",
        "_create_instance()",
    ),
    Edit(
        "later instances are not the first",
        "def _create_instance(self, first: int = 0)",
        "def _create_instance(self, first: int = FILE_FLAG_FIRST_PIPE_INSTANCE)",
    ),
    Edit(
        "a request ends with its brace",
        "                if self._depth <= 0:\n                    return True",
        "                pass",
    ),
    Edit(
        "a brace in a string ends nothing",
        "                self._in_string = True",
        "                pass",
    ),
    Edit(
        "an escaped quotation mark ends no string",
        "                    self._escaped = True",
        "                    pass",
    ),
    Edit(
        "what follows the brace is ignored",
        '_read_members(_go_value(data)[0], {"id"',
        '_read_members(_whole_go_value(data), {"id"',
    ),
    Edit("a key's case is ignored", "key.casefold()", "key"),
    Edit(
        "the last of several keys counts",
        "            members[name] = _expect(kind, key, member)",
        "            members.setdefault(name, _expect(kind, key, member))",
    ),
    Edit("null counts for nothing", "if name and member is not None:", "if name:"),
    Edit(
        "unknown keys are ignored", 'known.get(key.casefold(), ("", None))', "known[key.casefold()]"
    ),
    Edit("a member's type is checked", "if type(value) is not kind or", "if"),
    Edit("bytes that are not UTF-8 become U+FFFD", '"surrogateescape"', '"strict"'),
    Edit(
        "a lone surrogate becomes U+FFFD", 'return _SURROGATE.sub("\\ufffd", text)', "return text"
    ),
    Edit("NaN is not JSON", '    raise ValueError(f"{name} is not JSON")', "    return None"),
    Edit("deep JSON is refused", "except RecursionError:", "except MemoryError:"),
    Edit(
        "a long number is no burden",
        "return int(digits) if len(digits) <= 20 else float(digits)",
        "return int(digits)",
    ),
    Edit("a request has a limit", "if len(received) >= MAX_REQUEST:", "if False:"),
    Edit(
        "success is answered with the four bytes",
        "            client.answer = SHIM_SUCCESS\n",
        "            client.answer = SHIM_SUCCESS + SHIM_SUCCESS\n",
    ),
    Edit(
        "success follows the handler",
        "            self.handler(request)\n",
        "            client.answer = SHIM_SUCCESS\n            client.answered.set()\n            self.handler(request)\n",
    ),
    Edit(
        "a refusal is not success",
        'client.answer = str(error).encode("utf-8", "backslashreplace")',
        "client.answer = SHIM_SUCCESS",
    ),
    Edit(
        "no refusal looks like success",
        'if client.answer in (b"", SHIM_SUCCESS):',
        "if not client.answer:",
    ),
    Edit(
        "no refusal is empty",
        'if client.answer in (b"", SHIM_SUCCESS):',
        "if client.answer == SHIM_SUCCESS:",
    ),
    Edit("the answer is read before end of file", "            pipe._flush()\n", ""),
    Edit("success ends in a zero-length message", "            pipe.close_write()\n", ""),
    Edit(
        "the server closes after the client",
        "            while pipe.read(_BUFFER_SIZE):\n                pass\n",
        "",
    ),
    Edit(
        "a refusal has no newline",
        "        pipe.write(client.answer)\n",
        "        pipe.write(client.answer + (b'' if client.answer == SHIM_SUCCESS else b'\\n'))\n",
    ),
    Edit(
        "a refusal has no zero-length message",
        "        if client.answer == SHIM_SUCCESS:\n            # The zero",
        "        if client.answer:\n            # The zero",
    ),
    Edit(
        "an answer ends in a close, never a disconnect",
        "            client.pipe.close()\n\n    def _take",
        "            _kernel32.DisconnectNamedPipe(client.pipe._handle)\n            client.pipe.close()\n\n    def _take",
    ),
    Edit(
        "the server closes every connection",
        "        finally:\n            client.pipe.close()\n",
        "        finally:\n            self.__dict__.setdefault('kept', []).append(client.pipe)\n",
    ),
    Edit(
        "the handler has one request at a time",
        "            for client in self._arrivals():\n                self._carry_out(client)",
        "            for client in self._arrivals():\n                threading.Thread(target=self._carry_out, args=(client,)).start()",
    ),
    Edit(
        "one client waits, others are busy",
        "            self._changed.wait_for(lambda: not self._waiting or self._stopping)\n",
        "",
    ),
    Edit(
        "a silent client delays nobody",
        "lambda: client.arrived, _GRACE)",
        "lambda: client.arrived, 60)",
    ),
    Edit(
        "a silent client is cut off",
        "            self._allow(client, self.request_timeout, idle=True)\n            self._take_request(client)",
        "            self._allow(client, None, idle=True)\n            self._take_request(client)",
    ),
    Edit(
        "a client that doesn't read is cut off",
        "        self._allow(client, self.request_timeout, idle=False)\n",
        "        self._allow(client, None, idle=False)\n",
    ),
    Edit(
        "a client that doesn't close is cut off",
        "            self._allow(client, self.request_timeout, idle=True)\n            while",
        "            self._allow(client, None, idle=True)\n            while",
    ),
    Edit(
        "the pipe exists before it is served",
        "        self._held = self._hold_name()\n",
        "        self._held = self._create_instance(); self._held.close()\n",
    ),
    Edit(
        "the held instance takes no client",
        "                dial_pipe(self.pipe_path, timeout=0).close()\n                return held",
        "                return held",
    ),
    Edit(
        "the server refuses an unknown op and an empty ID",
        "            client.request.check()\n",
        "",
    ),
    # End of file and errors on a pipe.
    Edit(
        "a zero-length message stays end of file",
        "            self._at_end = error == 0 and count == 0\n",
        "",
    ),
    Edit(
        "a read after close is end of file",
        "        if error == ERROR_BROKEN_PIPE:\n            self._at_end = True\n            return 0\n",
        "",
    ),
    Edit(
        "more data is success",
        "if error in (0, ERROR_MORE_DATA):\n",
        "if error == 0:\n",
        "it takes message-read mode, in which Wine loses counts; its test is skipped there",
    ),
    Edit(
        "a disconnect is no end of file",
        "        if error == ERROR_BROKEN_PIPE:\n",
        "        if error in (ERROR_BROKEN_PIPE, ERROR_PIPE_NOT_CONNECTED):\n",
    ),
    Edit("a write to nobody is a broken pipe", "ERROR_NO_DATA = 232", "ERROR_NO_DATA = 23200"),
    Edit("no pipe is FileNotFoundError", "        FileNotFoundError,\n", "        TimeoutError,\n"),
    Edit(
        "access denied is PermissionError",
        "        PermissionError,\n        errno",
        "        TimeoutError,\n        errno",
    ),
    Edit(
        "busy is PipeBusyError",
        "        PipeBusyError,\n        errno",
        "        TimeoutError,\n        errno",
    ),
    Edit(
        "a client faster than ConnectNamedPipe is welcome",
        "error not in (0, ERROR_PIPE_CONNECTED)",
        "error not in (0,)",
    ),
    Edit(
        "a client that came and went ends nothing",
        "            except ConnectionError as error:",
        "            except ZeroDivisionError as error:",
    ),
    Edit(
        "a client that came and went gives up its instance",
        "        except BaseException:\n            client.pipe.close()\n",
        "        except BaseException:\n            self.__dict__.setdefault('kept', []).append(client.pipe)\n",
    ),
    Edit(
        "a deadline covers writes",
        "        error, count = self._run(_kernel32.WriteFile, message, len(message), None)\n",
        "        kept, self.deadline = self.deadline, math.inf\n        error, count = self._run(_kernel32.WriteFile, message, len(message), None)\n        self.deadline = kept\n",
    ),
    Edit(
        "a deadline covers reads",
        "        error, count = self._run(_kernel32.ReadFile, target, len(view), None)\n",
        "        kept, self.deadline = self.deadline, math.inf\n        error, count = self._run(_kernel32.ReadFile, target, len(view), None)\n        self.deadline = kept\n",
    ),
    Edit(
        "a flush has a timeout",
        "                _kernel32.CancelIoEx(self._handle, None)\n",
        "                pass\n",
    ),
    Edit(
        "WaitNamedPipeW's failure decides nothing",
        "            time.sleep(min(0.01, seconds))",
        "            raise _pipe_error(ERROR_FILE_NOT_FOUND, path)",
    ),
    Edit(
        "WaitNamedPipeW's success decides nothing",
        "        if _kernel32.WaitNamedPipeW(path, milliseconds) not in (0, ERROR_SEM_TIMEOUT):\n",
        "        deadline = 0.0\n        if _kernel32.WaitNamedPipeW(path, milliseconds) not in (0, ERROR_SEM_TIMEOUT):\n",
    ),
    Edit("WaitNamedPipeW is never given 0", "max(1, int(seconds * 1000))", "int(seconds * 1000)"),
    # Overlapped I/O.
    Edit(
        "too late is cancelled",
        "                _kernel32.CancelIoEx(self._handle, overlapped)\n",
        "",
    ),
    Edit(
        "what is cancelled is waited for",
        "                error = self._result(overlapped, count, signal, cancelled=True)\n",
        "                error = ERROR_OPERATION_ABORTED\n",
    ),
    Edit(
        "Ctrl-C cancels, too",
        "            if error in (ERROR_IO_PENDING, ERROR_IO_INCOMPLETE):\n",
        "            if error == ERROR_IO_INCOMPLETE and sys.exc_info()[0] is None:\n",
    ),
    Edit(
        "what completed after all counts",
        "                error = self._result(overlapped, count, signal, cancelled=True)\n",
        "                self._result(overlapped, count, signal, cancelled=True)\n                error = ERROR_OPERATION_ABORTED\n",
    ),
    Edit(
        "byte counts come from GetOverlappedResult",
        "        return error, count.value\n",
        "        return error, overlapped.Offset\n",
    ),
    Edit(
        "no direct byte count",
        "self._run(_kernel32.WriteFile, message, len(message), None)",
        "self._run(_kernel32.WriteFile, message, len(message), DWORD())",
    ),
    Edit("every function has argtypes", "        function.argtypes = argtypes\n", ""),
    Edit("every function has a restype", "        function.restype = restype\n", ""),
    Edit("INVALID_HANDLE_VALUE has 64 bits", "ctypes.c_void_p(-1).value", "0xFFFFFFFF"),
    Edit("errors are read by ctypes itself", ", use_last_error=True)", ")"),
    Edit(
        "kernel32 is our own",
        'ctypes.WinDLL("kernel32", use_last_error=True)',
        "ctypes.windll.kernel32",
    ),
    Edit("waits come in slices", "_SLICE = 0.1 ", "_SLICE = 3.0 "),
    Edit(
        "instances are overlapped",
        "PIPE_ACCESS_DUPLEX | FILE_FLAG_OVERLAPPED | first",
        "PIPE_ACCESS_DUPLEX | first",
    ),
    # The other two places.
    Edit("a child gives stdout up", "    os.close(1)\n", "    sys.stdout.close()\n"),
    Edit("a child tells of success", "    os.write(1, SHIM_SUCCESS)\n", ""),
    Edit("a child tells of failure", "        os.write(1, _text(error).encode())\n", ""),
    Edit(
        "a child tells after the pipe is there",
        "        started = server()\n    except",
        "        os.write(1, SHIM_SUCCESS)\n        started = server()\n    except",
    ),
    Edit(
        "a container's shim has a pipe of its own",
        "runhcs-shim-{_parse_guid",
        "runhcs-vm-{_parse_guid",
    ),
]


def try_edit(edit: Edit) -> tuple[bool, str]:
    """Return whether the suite noticed, and which test did or what went wrong."""
    with open(os.path.join(ROOT, "vmshim.py"), encoding="utf-8") as file:
        source = file.read()
    if source.count(edit.old) != 1:
        return False, f"the text to replace is there {source.count(edit.old)} times"
    with tempfile.TemporaryDirectory() as folder:
        for name in FILES:
            shutil.copy(os.path.join(ROOT, name), folder)
        path = os.path.join(folder, "vmshim.py")
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.write(source.replace(edit.old, edit.new))
        compile(source.replace(edit.old, edit.new), path, "exec")
        suite = subprocess.run(
            ["timeout", "-s", "KILL", "90", os.path.join(HERE, "wine-python"), *SUITE],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        )
    if abs(suite.returncode) in (9, 128 + 9):
        return True, "hangs at " + suite.stdout.rstrip().rpartition("\n")[2][:80]
    if suite.returncode == 0:
        return False, ""
    failed = re.search(r"^(?:FAIL|ERROR): (\S+)", suite.stdout, re.MULTILINE)
    return True, failed[1] if failed else "the suite broke off: " + suite.stdout[-300:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="REGEX")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    edits = [edit for edit in EDITS if re.search(options.only, edit.rule)]
    survived = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for edit, (noticed, how) in zip(edits, pool.map(try_edit, edits)):
            verdict = "noticed " if noticed else "excused " if edit.excuse else "SURVIVED"
            print(f"{verdict}  {edit.rule}: {how or edit.excuse}", flush=True)
            survived += verdict == "SURVIVED"
    print(f"{survived} of {len(edits)} survived")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
