"""The request by pywin32, as one would write it."""

import json
import sys

import pywintypes
import win32file


def request(path: str) -> None:
    pipe = win32file.CreateFile(
        path,
        win32file.GENERIC_READ | win32file.GENERIC_WRITE,
        0,
        None,
        win32file.OPEN_EXISTING,
        0,
        None,
    )
    try:
        message = json.dumps({"ID": "c8d6f0", "Op": "unmount"}, separators=(",", ":")) + "\n"
        win32file.WriteFile(pipe, message.encode())
        response = b""
        while True:
            try:
                _, data = win32file.ReadFile(pipe, 4096)
            except pywintypes.error as error:
                if error.winerror == 109:
                    break
                raise
            if not data:
                break
            response += data
    finally:
        win32file.CloseHandle(pipe)
    if response != b"\0OK\0":
        raise RuntimeError(response)


if __name__ == "__main__":
    request(sys.argv[1])
