"""The exchange by CPython's own _winapi, as multiprocessing.connection uses it."""

import _winapi

MESSAGE = b'{"ID":"c8d6f0","Op":"unmount"}\n'


def exchange(path: str) -> None:
    pipe = _winapi.CreateFile(
        path,
        _winapi.GENERIC_READ | _winapi.GENERIC_WRITE,
        0,
        _winapi.NULL,
        _winapi.OPEN_EXISTING,
        _winapi.FILE_FLAG_OVERLAPPED,
        _winapi.NULL,
    )
    try:
        operation, error = _winapi.WriteFile(pipe, MESSAGE, overlapped=True)
        if error == _winapi.ERROR_IO_PENDING:
            _winapi.WaitForMultipleObjects([operation.event], False, _winapi.INFINITE)
        operation.GetOverlappedResult(True)
        operation, error = _winapi.ReadFile(pipe, 4096, overlapped=True)
        if error == _winapi.ERROR_IO_PENDING:
            _winapi.WaitForMultipleObjects([operation.event], False, _winapi.INFINITE)
        operation.GetOverlappedResult(True)
        assert operation.getbuffer() == b"\0OK\0"
    finally:
        _winapi.CloseHandle(pipe)
