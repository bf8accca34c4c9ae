"""The least that can be done in ctypes: no deadline, no Ctrl-C, no busy pipe, no errors."""

import ctypes
import sys
from ctypes import wintypes

MESSAGE = b'{"ID":"c8d6f0","Op":"unmount"}\n'

kernel32 = ctypes.WinDLL("kernel32")
kernel32.CreateFileW.restype = wintypes.HANDLE
kernel32.CreateFileW.argtypes = (
    wintypes.LPCWSTR,
    *(wintypes.DWORD, wintypes.DWORD, wintypes.LPVOID, wintypes.DWORD, wintypes.DWORD),
    wintypes.HANDLE,
)
kernel32.ReadFile.argtypes = kernel32.WriteFile.argtypes = (
    *(wintypes.HANDLE, wintypes.LPVOID, wintypes.DWORD, wintypes.LPDWORD, wintypes.LPVOID),
)
kernel32.CloseHandle.argtypes = (wintypes.HANDLE,)


def request(path: str) -> None:
    pipe = kernel32.CreateFileW(path, 0xC0000000, 0, None, 3, 0, None)
    count = wintypes.DWORD()
    kernel32.WriteFile(pipe, MESSAGE, len(MESSAGE), ctypes.byref(count), None)
    buffer = ctypes.create_string_buffer(4096)
    response = b""
    while kernel32.ReadFile(pipe, buffer, 4096, ctypes.byref(count), None) and count.value:
        response += buffer.raw[: count.value]
    kernel32.CloseHandle(pipe)
    assert response == b"\0OK\0", response


def exchange(path: str) -> None:
    pipe = kernel32.CreateFileW(path, 0xC0000000, 0, None, 3, 0, None)
    count = wintypes.DWORD()
    kernel32.WriteFile(pipe, MESSAGE, len(MESSAGE), ctypes.byref(count), None)
    buffer = ctypes.create_string_buffer(4096)
    kernel32.ReadFile(pipe, buffer, 4096, ctypes.byref(count), None)
    kernel32.CloseHandle(pipe)
    assert buffer.raw[: count.value] == b"\0OK\0", buffer.raw[: count.value]


if __name__ == "__main__":
    request(sys.argv[1])
