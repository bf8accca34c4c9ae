"""Small histories of pipes, with what Windows answers at each step, and Wine where it differs.

They are run on the model (`.ci/simulate.py --histories`) and, under Wine, on the real kernel32
(`.ci/wine-python .ci/simulation/histories.py`). TABLE has them: a line with the name and, in
brackets, the source; then the steps, explained at `Steps`, each by its function:

    read c 10 as r -> 997           what is called, and what Windows answers; no answer means 0
    result r -> 0 3 abc             an operation's error, count and data
    flush s -> 0 (wine: 5)          Wine answers otherwise
    join w -> 2 or 121              nobody is sure; the model does either

A step with by=ACCOUNT is done by another user: such a history can be run on the model only. In a
path, % stands for a name of the history's own, and _ for a space. The sources: K32, NT and NTF are
Wine's conformance tests (pipe.c of kernel32/tests, pipe.c and file.c of ntdll/tests; they pass on
Windows, so they say what Windows does), DOCS is Microsoft's documentation, NPFS ReactOS' driver,
WINIO go-winio.
"""

from __future__ import annotations

import ctypes
import re
import sys
from typing import Any, Callable, NamedTuple

TABLE = r"""
# The life of an instance.
an instance listens from its creation on [K32: test_CreateNamedPipe]
    create s, open c, connect s -> 535
a pending connect ends when a client opens [NT: test_pipe_state; K32: test_overlapped_error]
    create s, connect s as k -> 997, result k -> 996, open c, wait k -> 0 0, signaled k -> yes
connect while a client is there [K32: test_overlapped_error]
    pair s c, connect s as k -> 535, internal k -> 0x103 0, signaled k -> no, result k -> 996
connect after the client has gone [NT: test_pipe_state]
    pair s c, close c, connect s as k -> 232, internal k -> 0x103 0, signaled k -> no
connect after the client has gone and left data [NT: test_pipe_with_data_state]
    pair s c quota=100, write c abc, close c, connect s -> 232, read s 10 as r,
    result r -> 0 3 abc, read s 10 -> 109
one client ends all pending connects [NPFS: statesup.c]
    create s, connect s as k -> 997, connect s as l -> 997, open c, wait k -> 0 0, wait l -> 0 0
a listening instance can't be read or written [NT: test_pipe_state]
    create s, read s 10 as r -> 536, internal r -> 0x103 0, write s abc as w -> 536,
    internal w -> 0x103 0, flush s
an instance whose client has gone [NT: test_pipe_state]
    pair s c, close c, read s 10 -> 109, write s abc -> 232, write s nothing -> 232, flush s,
    disconnect s
a disconnected instance [NT: test_pipe_state]
    pair s c, disconnect s, read s 10 -> 233, write s abc -> 233, flush s, disconnect s -> 233,
    connect s -> 997, open d, wait s.connect -> 0 0
a client that was disconnected [NT: test_pipe_state]
    pair s c, disconnect s, read c 10 -> 233, write c abc -> 233, flush c -> 233, close c
a client that was disconnected stays so when the instance has another [NT: test_pipe_state]
    pair s c quota=10, disconnect s, connect s -> 997, open d, read c 10 -> 233,
    write c abc -> 233, write d abc, close c, read s 10 as r, result r -> 0 3 abc
a client can't connect or disconnect [NT: test_create; NPFS: fsctrl.c]
    pair s c, connect c -> 1, disconnect c -> 1 (wine: 50)
disconnect of a listening instance [NPFS: statesup.c]
    create s, disconnect s -> 0 (wine: 536), open c -> 231 (wine: 0)
disconnect ends a pending connect [NPFS: statesup.c]
    create s, connect s as k -> 997, disconnect s -> 0 (wine: 536),
    wait k 100 -> 233 0 (wine: 258)
close ends a pending connect [NPFS: statesup.c; that the event is set: K32: test_wait_pipe]
    create s, connect s as k -> 997, close s, signaled k -> yes
the name is free once the server's handle is closed [NT: test_pipe_local_info]
    pair s c limit=1, close s, open d -> 2, create t limit=1, open d

# Opening and creating.
no such pipe [K32: test_CreateNamedPipe]
    open c -> 2
no instance that listens [K32: test_CreateNamedPipe]
    pair s c, open d -> 231, close c, open d -> 231, disconnect s, open d -> 231
the instance that has listened longest gets the client [K32: test_multiple_instances]
    create s quota=9, create t quota=9, connect t -> 997, open c, connect s -> 535,
    result t.connect -> 996, open d, wait t.connect -> 0 0
an instance that is connected again goes to the end of the line [K32: test_multiple_instances]
    create s, create t, open c, disconnect s, connect s -> 997, open d, connect t -> 535,
    result s.connect -> 996
access that the direction excludes [NT: test_create]
    create s in, open c r -> 5, open c -> 5, open c w
access that the other direction excludes [NT: test_create]
    create s out, open c w -> 5, open c r
a client without any access takes the instance [K32: test_CreateNamedPipe]
    create s, open c none, open d -> 231, connect s -> 535
a client may only do what it opened for [DOCS: CreateFile]
    create s quota=10, open c r, write c abc -> 5, write s abc, read c 10 as r,
    result r -> 0 3 abc
a further instance may differ in type and sizes [K32: test_CreateNamedPipe_instances_must_match]
    create s, create t byte quota=100 timeout=5 limit=7
a further instance must have the same direction [K32: test_CreateNamedPipe_instances_must_match]
    create s, create t in -> 5, create t out -> 5
more instances than the first allows [K32: test_CreateNamedPipe_instances_must_match]
    create s limit=1, create t limit=2 -> 231, close s, create t limit=2, create u limit=2,
    create v limit=2 -> 231
a closing or disconnected instance counts [K32, NT]
    pair s c limit=1, close c, create t -> 231, disconnect s, create t -> 231, close s, create t
the first instance must be the first [NT: test_create_invalid; DOCS: CreateNamedPipe]
    create s first, create t first -> 5 (wine: 0), create u
the first instance where the limit is reached [NT: test_pipe_local_info; NPFS: create.c]
    create s first limit=1, create t first limit=1 -> 231
how many instances may be asked for [DOCS: CreateNamedPipe]
    create s limit=0 -> 87 (wine: 0), create t limit=256 path=\\.\pipe\%-two -> 87 (wine: 0),
    create u limit=254 path=\\.\pipe\%-three
messages can't be read from bytes [K32: test_CreateNamedPipe]
    create s byte message-reads -> 87
no name at all [K32: test_CreateNamedPipe]
    create s path= -> 3, create s path=nothing -> 123

# What an end's closing does.
what was written before closing can be read [K32: test_CloseHandle]
    pair s c quota=100, write s abc, write s nothing, close s, read c 3 as r, result r -> 0 3 abc,
    read c 10 as r, result r -> 0 0, read c 10 -> 109, read c 10 -> 109
two messages before closing [K32: test_CloseHandle]
    pair s c quota=100, write c abc, write c defg, close c, read s 2 as r, result r -> 0 2 ab,
    read s 100 as r, result r -> 0 5 cdefg, read s 1 -> 109
closing ends the other end's pending write [K32: test_overlapped_transport]
    pair s c, write s abc as w -> 997, close c, wait w -> 109 0
closing ends a pending write that was read in part [K32: test_overlapped_transport]
    pair s c, write s abcdef as w -> 997, read c 2 as r, result r -> 0 2 ab, result w -> 996,
    close c, wait w -> 109 0
closing ends the other end's pending read [NT: read_pipe_test]
    pair s c, read s 10 as r -> 997, close c, wait r -> 109 0, internal r -> 0xc000014b 0
closing ends the other end's flush [K32: test_overlapped_transport]
    pair s c quota=100, write s abc, start f flush s, asleep f -> yes, close c, join f -> 109
closing ends one's own pending read [NTF: test_iocp_fileio]
    pair s c, read c 10 as r -> 997, close c, signaled r -> yes, internal r -> 0xc000014b 0
a pending write outlives its handle [NPFS: statesup.c (not sure)]
    pair s c, write c abc as w -> 997, close c, read s 10 as r -> 0 (wine: 109),
    internal w -> 0x0 3 (wine: 0xc000014b 0), read s 10 -> 109
what the closing end hasn't read is dropped [NPFS: statesup.c]
    pair s c quota=100, write s abc, close c, flush s, read s 10 -> 109
disconnect drops data and ends reads [K32: test_overlapped_transport, test_DisconnectNamedPipe]
    pair s c quota=100, read s 10 as r -> 997, write s abc, disconnect s, wait r -> 233 0,
    read c 10 -> 233
disconnect ends the pending writes of both ends [K32: test_overlapped_transport]
    pair s c, write s abc as w -> 997, write c def as x -> 997, disconnect s, wait w -> 233 0,
    wait x -> 233 0
disconnect ends the client's pending read [K32: test_overlapped_transport]
    pair s c, read c 10 as r -> 997, disconnect s, wait r -> 233 0
disconnect ends a flush [K32: test_overlapped_transport]
    pair s c quota=100, write c abc, start f flush c, asleep f -> yes, disconnect s, join f -> 233

# Reads.
a byte read takes many messages [K32: test_CreateNamedPipe, test_blocking_rw]
    pair s c quota=100, write s ab, write s cd, write s ef, read c 5 as r, result r -> 0 5 abcde,
    read c 5 as r, result r -> 0 1 f
a message read takes one message [K32: test_CreateNamedPipe]
    pair s c message-reads quota=100, write c ab, write c cd, read s 10 as r, result r -> 0 2 ab,
    read s 10 as r, result r -> 0 2 cd
a message that is too long [K32: test_CreateNamedPipe, overlapped_read_sync]
    pair s c message-reads quota=100, write c abcdef, read s 4 as r -> 234,
    internal r -> 0x80000005 4, signaled r -> yes, result r -> 234 4 abcd, read s 4 as r,
    result r -> 0 2 ef
the direct count of a message that is too long is 0 [K32: test_ReadFile, overlapped_read_sync]
    pair s c message-reads quota=100, write c abcdef, readcount s 4 as r -> 234 0,
    result r -> 234 4 abcd, readcount s 4 as r -> 0 2
pending reads are served in order [K32: test_blocking_rw]
    pair s c quota=100, read c 2 as r -> 997, read c 5 as q -> 997, write s abcde as w,
    wait r -> 0 2 ab, wait q -> 0 3 cde
a message fills pending reads one after the other [K32: test_blocking_rw]
    pair s c message-reads, read s 2 as r -> 997, read s 5 as q -> 997, write c abcde as w,
    wait r -> 234 2 ab, wait q -> 0 3 cde
a pending read gets less than it asked for [NT: read_pipe_test]
    pair s c, read c 100 as r -> 997, write s a as w, wait r -> 0 1 a
a pending read writes nothing before it ends [K32: test_ReadFile]
    pair s c, read c 9 as r -> 997, internal r -> 0x103 0, signaled r -> no, write s abc,
    internal r -> 0x0 3, signaled r -> yes
a read of no bytes waits for data and takes none [K32: test_readfileex_pending, test_blocking_rw]
    pair s c quota=100, read c 0 as r -> 997, write s abc as w, wait r -> 0 0, read c 9 as q,
    result q -> 0 3 abc
a message read of no bytes waits for data and takes none [K32: test_blocking_rw]
    pair s c message-reads quota=100, read s 0 as r -> 997, write c abc as w, wait r -> 234 0,
    read s 9 as q, result q -> 0 3 abc
a read of no bytes where data is [K32: test_CloseHandle]
    pair s c quota=100, write s abc, read c 0 as r, result r -> 0 0, read c 9 as r,
    result r -> 0 3 abc
a message read of no bytes where data is [K32: test_CloseHandle]
    pair s c message-reads quota=100, write c abc, read s 0 as r -> 234, result r -> 234 0,
    read s 9 as r, result r -> 0 3 abc
a read of no bytes takes a zero-length message [CPython, multiprocessing/connection.py: wait]
    pair s c message-reads quota=100, write c nothing, write c abc, read s 0 as r,
    result r -> 0 0, read s 9 as r, result r -> 0 3 abc
a read of no bytes where nothing will come [K32: test_CloseHandle]
    pair s c, close s, read c 0 -> 109
a zero-length message alone [K32: test_blocking_rw, test_CloseHandle]
    pair s c quota=100, write s nothing, read c 9 as r, result r -> 0 0, read c 9 as r -> 997
a zero-length message after one that is used up [K32: test_CloseHandle]
    pair s c quota=100, write s abc, write s nothing, read c 3 as r, result r -> 0 3 abc,
    read c 3 as r, result r -> 0 0
a zero-length message meets a pending read [K32: test_blocking_rw]
    pair s c, read c 9 as r -> 997, read c 9 as q -> 997, write s nothing as w, wait r -> 0 0,
    result q -> 996
a zero-length message meets a pending read of no bytes [K32: test_blocking_rw]
    pair s c, read c 0 as r -> 997, read c 9 as q -> 997, write s nothing as w, wait r -> 0 0,
    result q -> 996
a byte reader with room to spare swallows a zero-length message [NPFS; WINIO: 7c7d6b4]
    pair s c quota=100, write s abc, write s nothing, read c 9 as r, result r -> 0 3 abc,
    read c 9 as r -> 997 (wine: 0)
a zero-length message behind a pending write is swallowed too [NPFS; WINIO: 7c7d6b4]
    pair s c, write s abc as w -> 997, write s nothing, read c 9 as r, result r -> 0 3 abc,
    wait w -> 0 3, read c 9 as r -> 997 (wine: 0)
a zero-length message after a write that was read arrives [WINIO: 7c7d6b4; K32: test_blocking_rw]
    pair s c, write s abc as w -> 997, read c 9 as r, wait w -> 0 3, write s nothing,
    read c 9 as r, result r -> 0 0
a zero-length message after a flush arrives [WINIO: pipe_test.go, TestFullDuplex and CloseWrite]
    pair s c quota=100, write s abc, start f flush s, read c 9 as r, join f, write s nothing,
    read c 9 as r, result r -> 0 0
a byte reader loses a zero-length message before data [NPFS: readsup.c]
    pair s c quota=100, write s nothing, write s abc, read c 9 as r, result r -> 0 3 abc,
    read c 9 as r -> 997
a message reader gets each zero-length message [K32: test_blocking_rw]
    pair s c message-reads quota=100, write c ab, write c nothing, write c nothing, write c cd,
    read s 9 as r, result r -> 0 2 ab, read s 9 as r, result r -> 0 0, read s 9 as r,
    result r -> 0 0, read s 9 as r, result r -> 0 2 cd
a zero-length write on a byte pipe does nothing [K32: test_blocking_rw]
    pair s c byte quota=100, read c 9 as r -> 997, write s nothing as w, result r -> 996,
    write s a, wait r -> 0 1 a

# Writes and quotas.
quota 0: a write waits until all of it is read [NPFS: writesup.c]
    pair s c, write s abcd as w -> 997, read c 3 as r, result r -> 0 3 abc, result w -> 996,
    read c 3 as r, wait w -> 0 4
quota 0: a pending read takes all [NPFS: writesup.c]
    pair s c, read c 9 as r -> 997, write s abcd as w, result w -> 0 4, wait r -> 0 4 abcd
quota 0: a pending read takes a part [NPFS: writesup.c]
    pair s c, read c 2 as r -> 997, write s abcd as w -> 997, wait r -> 0 2 ab, result w -> 996,
    read c 2 as r, result r -> 0 2 cd, wait w -> 0 4
a write that fits in the quota [K32: test_blocking_rw]
    pair s c quota=4, write s abc as w, result w -> 0 3, write s d as w, write s e as w -> 997,
    read c 1 as r, wait w -> 0 1
the quota is exact [K32: test_blocking_rw, test_nowait]
    pair s c quota=4096, write s 4096*a as w, write s b as x -> 997, read c 1 as r, wait x -> 0 1
an odd quota isn't rounded [K32: test_blocking_rw]
    pair s c quota=5000, write s 5000*a as w, write s b as x -> 997
each direction has a quota of its own [DOCS: CreateNamedPipe]
    pair s c out=3 in=1, write s abc as w, write c a as x, write c b as x -> 997,
    write s d as w -> 997
a write larger than the quota [K32: test_blocking_rw]
    pair s c quota=4, write s abcdef as w -> 997, read c 1 as r, result w -> 996, read c 1 as r,
    wait w -> 0 6
a second write waits behind the first [K32: test_blocking_rw]
    pair s c quota=4, write s abcdef as w -> 997, write s g as x -> 997, read c 2 as r,
    wait w -> 0 6, result x -> 996, read c 1 as r, wait x -> 0 1
a zero-length write never waits [K32: test_blocking_rw]
    pair s c, write s abc as w -> 997, write s nothing as x, result x -> 0 0
a write that is cancelled takes its unread rest away [K32: test_blocking_rw]
    pair s c, write s abcd as w -> 997, read c 1 as r, result r -> 0 1 a, cancel s w,
    wait w -> 995 0, read c 9 as r -> 997
the writes behind a cancelled one move up [K32: test_blocking_rw]
    pair s c quota=2, write s abcd as w -> 997, write s ef as x -> 997, cancel s w,
    wait w -> 995 0, wait x -> 0 2, read c 9 as r, result r -> 0 2 ef
a message reader takes a part of a pending write [K32: test_blocking_rw]
    pair s c message-reads, write c abcd as w -> 997, read s 3 as r -> 234, result w -> 996,
    read s 3 as r, result r -> 0 1 d, wait w -> 0 4
a write when the other end has closed [K32: test_CloseHandle, serverThreadMain4]
    pair s c quota=100, close s, write c abc as w -> 232, internal w -> 0x103 0,
    write c nothing -> 232

# Overlapped operations.
a new handle is signaled, until something starts [K32: test_ReadFile; NT: read_pipe_test]
    pair s c, signaled c -> yes, read c 9 without-event as r -> 997, signaled c -> no, write s a,
    signaled c -> yes
an operation with an event resets the handle and leaves it [NT: test_completion]
    pair s c, read c 9 as r -> 997, signaled c -> no, write s a, signaled r -> yes,
    signaled c -> no
success at once fills in everything [K32: overlapped_read_sync]
    pair s c quota=9, write s abc as w, internal w -> 0x0 3, signaled w -> yes,
    readcount c 9 as r -> 0 3, internal r -> 0x0 3, signaled r -> yes, result r -> 0 3 abc
failure at once leaves Internal pending for ever [K32: test_overlapped_error; NT: read_pipe_test]
    pair s c, close s, read c 9 as r -> 109, internal r -> 0x103 0, signaled r -> no,
    result r -> 996, wait r 50 -> 258, cancel c r -> 1168
the result of a pending operation [K32: serverThreadMain3]
    pair s c, read c 9 as r -> 997, result r -> 996, wait r 50 -> 258, write s ab,
    result r -> 0 2 ab
the result of a failed operation has a count of 0 [K32: test_overlapped_failure]
    pair s c, read c 9 as r -> 997, close s, result r -> 109 0
an OVERLAPPED is used again, its event still set [NT: read_pipe_test]
    pair s c quota=9, read c 9 as r -> 997, write s ab, wait r -> 0 2 ab, read c 9 as r -> 997,
    signaled r -> no
no OVERLAPPED on an overlapped handle: it waits [K32: test_overlapped]
    pair s c quota=9, start t read c 9 sync, asleep t -> yes, write s ab, join t -> 0 2 ab,
    write c ab sync -> 0 2
a synchronous handle waits [K32: test_blocking_rw]
    create s sync, start t connect s sync, asleep t -> yes, open c, join t, start t read s 9 sync,
    asleep t -> yes, write c ab, join t -> 0 2 ab
a synchronous write waits until it is read [K32: test_blocking_rw]
    create s, open c sync, start t write c abc sync, asleep t -> yes, read s 9 as r, join t -> 0 3

# Cancelling.
cancel of a pending read [K32: cancel_overlapped; NT: test_cancelio]
    pair s c, read c 9 as r -> 997, cancel c r, internal r -> 0xc0000120 0, wait r -> 995 0,
    signaled r -> yes
cancel of what isn't pending [K32: test_blocking_rw; DOCS: CancelIoEx]
    pair s c quota=9, read c 9 as r -> 997, write s a, cancel c r -> 1168, wait r -> 0 1 a
cancel twice [K32: test_blocking_rw]
    pair s c, write s abc as w -> 997, cancel s w, cancel s w -> 1168
cancel everything where nothing is pending [DOCS: CancelIoEx]
    pair s c, cancel c all -> 1168 (wine: 0)
cancel everything [NT: read_pipe_test]
    pair s c, read c 9 as r -> 997, read c 9 as q -> 997, write c abc as w -> 997, cancel c all,
    wait r -> 995 0, wait q -> 995 0, wait w -> 995 0
cancel one of two reads [NT: test_cancelio]
    pair s c, read c 9 as r -> 997, read c 9 as q -> 997, cancel c r, write s abc,
    wait r -> 995 0, wait q -> 0 3 abc
cancel ends both operations of an OVERLAPPED [NT: read_pipe_test]
    pair s c, read c 9 as r -> 997, read c 9 again as r -> 997, cancel c r,
    write s abc as w -> 997
a cancelled connect leaves the instance listening [K32: test_overlapped; NT: test_cancelio]
    create s, connect s as k -> 997, cancel s k, wait k -> 995 0, open c, connect s -> 535
cancel ends a flush in another thread [NPFS (it has a cancel routine); DOCS: CancelIoEx]
    pair s c quota=9, write s abc, start f flush s, asleep f -> yes, cancel s all, join f -> 995,
    read c 9 as r, result r -> 0 3 abc

# Events that operations share.
an event that resets itself lets one wait through [DOCS: CreateEventW, WaitForSingleObject]
    event e auto, signaled e -> no, set e, set e, signaled e -> yes, signaled e -> no
an event that doesn't reset itself stays set [DOCS: CreateEventW]
    event e, set e, signaled e -> yes, signaled e -> yes
SetEvent wakes a thread that waits, and one alone [DOCS: SetEvent]
    event e auto, start t signaled e 2000, start u signaled e 300, asleep t -> yes, set e,
    join t -> yes, join u -> no
each of two operations sets their event [DOCS: OVERLAPPED; NT: test_completion]
    pair s c, event e auto, read s 9 on e as r -> 997, write s abc on e as w -> 997, write c ab,
    signaled e -> yes, signaled e -> no, result r -> 0 2 ab, result w -> 996, read c 9,
    signaled e -> yes, signaled e -> no, result w -> 0 3
the start of another operation takes the signal away [DOCS: ReadFile; NT: read_pipe_test]
    pair s c, event e auto, read s 9 on e as r -> 997, write c ab, write s abc on e as w -> 997,
    signaled e -> no, result r -> 0 2 ab, result w -> 996
the start takes SetEvent's signal away, too [DOCS: ReadFile]
    pair s c, event e auto, set e, read s 9 on e -> 997, signaled e -> no
a failure at once takes the signal away and gives none [K32: test_overlapped_error]
    pair s c, event e auto, close s, set e, read c 9 on e -> 109, signaled e -> no
success at once sets the event [K32: overlapped_read_sync]
    pair s c quota=9, event e auto, write s abc on e as w, signaled e -> yes, signaled e -> no,
    read c 9 on e as r, signaled e -> yes
a cancelled operation sets the event [K32: cancel_overlapped]
    pair s c, event e auto, read s 9 on e as r -> 997, cancel s r, signaled e -> yes,
    result r -> 995 0
a pending read that gets too long a message [NT: test_completion]
    pair s c message-reads, read s 2 as r -> 997, write c abc as w -> 997, result r -> 234 2 ab
failure at once sets no event [K32: serverThreadMain4]
    pair s c, connect s as k -> 535, signaled k -> no, close c, connect s as k -> 232,
    signaled k -> no, read s 9 as r -> 109, signaled r -> no, write s abc as w -> 232,
    signaled w -> no
cancel of a read and of a write [DOCS: CancelIoEx; K32: test_exit_process_async]
    pair s c, read s 9 as r -> 997, write s abc as w -> 997, cancel s r, cancel s w,
    wait r -> 995 0, wait w -> 995 0
one's own disconnect ends a read and a write [NT, K32: the status]
    pair s c, read s 9 as r -> 997, write s abc as w -> 997, disconnect s, wait r -> 233 0,
    wait w -> 233 0
one's own closing ends a connect [NPFS: statesup.c]
    create s, connect s as k -> 997, close s, result k -> 109 0 (wine: 676 0)
an operation ends with the thread that has started it [DOCS: ReadFile]
    pair s c, start t read s 9 as r, join t -> 997, wait r -> 995 0
a handle that is closed [NT: read_pipe_test (invalid handle)]
    pair s c, close c, close c -> 6, read c 9 as r -> 6, write c abc -> 6,
    cancel c all -> 6 (wine: 0), flush c -> 6

# WaitNamedPipeW and FlushFileBuffers.
wait for an instance that listens [K32: test_wait_pipe]
    create s, waitpipe 1000, waitpipe 0, open c
wait for a pipe that isn't there [K32: test_wait_pipe; DOCS: WaitNamedPipe]
    waitpipe 1000 -> 2, waitpipe 4294967295 -> 2
wait for a busy pipe [K32: test_wait_pipe]
    pair s c, waitpipe 30 -> 121, close c, waitpipe 30 -> 121, disconnect s, waitpipe 30 -> 121,
    connect s -> 997, waitpipe 30
wait as long as the pipe's default [DOCS: WaitNamedPipe, CreateNamedPipe]
    pair s c timeout=200, start w waitpipe 0, asleep w -> yes, join w -> 121
the default of a pipe's default [DOCS: CreateNamedPipe]
    pair s c timeout=0, start w waitpipe 0, join w -> 121
a new instance wakes who waits [K32: test_wait_pipe]
    pair s c, start w waitpipe 2000, start v waitpipe 2000, asleep w -> yes, create t, join w,
    join v
an instance that listens again wakes who waits [K32: test_wait_pipe; NPFS: waitsup.c]
    pair s c, start w waitpipe 2000, disconnect s, asleep w -> yes, connect s -> 997, join w
the last instance goes while somebody waits [not sure]
    pair s c, start w waitpipe 500, close s, join w -> 2 or 121
an instance that is made after the last one's end ends the wait [NPFS: waitsup.c]
    pair s c, start w waitpipe 900, close s, close c, create t, join w -> 0 or 2 (wine: 676)
the last instance goes, its client first [not sure]
    pair s c, start w waitpipe 500, close c, asleep w -> yes, close s,
    join w -> 2 or 121 (wine: 676)
wait with no limit [DOCS: WaitNamedPipe]
    pair s c, start w waitpipe 4294967295, asleep w -> yes, create t, join w
flush waits until all is read [K32: test_blocking_rw]
    pair s c quota=9, write s ab, write s cd, start f flush s, read c 3 as r, asleep f -> yes,
    read c 3 as r, join f
flush waits for a pending write [NT: test_blocking]
    pair s c, write s abcd as w -> 997, start f flush s, asleep f -> yes, read c 9 as r, join f,
    wait w -> 0 4
flush waits for a zero-length message [K32: test_blocking_rw]
    pair s c, write s nothing, start f flush s, asleep f -> yes, read c 9 as r, join f
flush doesn't wait for what comes later [NPFS: flush.c (a flush has its place in the queue)]
    pair s c quota=9, write s ab, start f flush s, write s cd, read c 2 as r,
    join f -> 0 (wine: asleep)
nothing to flush [K32: test_blocking_rw]
    pair s c quota=9, flush s, flush c, read s 9 as r -> 997, flush s, write c ab, flush c
flush ends when the unread write is cancelled [K32: test_blocking_rw]
    pair s c, write s ab as w -> 997, start f flush s, asleep f -> yes, cancel s w, join f

# Names.
the case of a name doesn't matter [DOCS: CreateNamedPipe; K32: test_CreateNamedPipe]
    create s path=\\.\PiPe\%-Name, open c path=\\.\pipe\%-nAME
Windows tidies a path below \\.\ [DOCS: file path formats]
    create s path=\\.\pipe\%., create t path=//./pipe/%-two, create u path=\\.\pipe\a\..\%-three,
    open c path=\\.\pipe\%, open d path=\\.\pipe\%-two., open e path=\\.\pipe\.\%-three
Windows takes a path below \\?\ as it is [DOCS: file path formats]
    create s path=\\?\pipe\%., open c path=\\?\pipe\% -> 2, open c path=\\?\pipe\%.
out of the pipes' folder [DOCS: file path formats]
    create s path=\\.\pipe\..\% -> 123
backslashes in a name [NT: test_empty_name, test_pipe_names]
    create s path=\\.\pipe\%\a\b\c, open c path=\\.\pipe\%\a\b\c
a name below a pipe's name [NPFS: create.c (prefix table)]
    create s path=\\.\pipe\%, create t path=\\.\pipe\%\b -> 123 (wine: 0),
    open c path=\\.\pipe\%\c -> 123 (wine: 2)
a name above a pipe's name [NPFS: create.c (prefix table)]
    create s path=\\.\pipe\%\b, create t path=\\.\pipe\%, open c path=\\.\pipe\%\b,
    open d path=\\.\pipe\%
odd characters in a name [K32: test_CreateNamedPipe; NT: test_pipe_names]
    create s path=\\.\pipe\%-<>*?|":, open c path=\\.\pipe\%-<>*?|":

# Security.
a security descriptor's text [Wine, advapi32/tests/security.c]
    sddl D:(A;;GA;;;BA)(A;;GA;;;SY), sddl D:(A;;GA;;;BA) 2 -> 1305, sddl garbage -> 87,
    sddl D:(A;;QQ;;;BA) -> 1336, sddl D:(A;;GA;;;QQ) -> 1336, sddl empty, sddl D:
a descriptor that grants nothing [DOCS: named pipe security and access rights]
    create s sddl=D:, open c -> 5 (wine: 0), create t -> 5 (wine: 0)
a descriptor that only lets read [DOCS: named pipe security and access rights]
    create s sddl=D:(A;;GR;;;WD), open c -> 5 (wine: 0), open d r -> 0 (wine: 231),
    create t -> 5 (wine: 0)
a further instance needs the right to create one [DOCS; NPFS: create.c]
    create s sddl=D:(A;;0x12019b;;;WD), open c, create t -> 5 (wine: 0)
reading and writing take more than their two bits [DOCS: file access rights]
    create s sddl=D:(A;;0x3;;;WD), open c -> 5 (wine: 0)
administrators may [DOCS: named pipe security and access rights]
    create s sddl=D:(A;;GA;;;BA)(A;;GA;;;SY) reject-remote first, create t, open c, open d
without a descriptor everyone may read [DOCS: named pipe security and access rights]
    create s, open c by=user -> 5, open c w by=user -> 5, open c r by=user, create t,
    open d r by=anonymous, create u by=user -> 5
a descriptor keeps out whoever it doesn't name [DOCS: named pipe security and access rights]
    create s sddl=D:P(A;;GA;;;SY)(A;;GA;;;BA)(A;;GA;;;OW), open c by=user -> 5,
    open c r by=user -> 5, open c none by=user -> 5, open c r by=anonymous -> 5,
    create t by=user -> 5, open c by=system
the owner may do what OW says [DOCS: security identifiers]
    create s by=user sddl=D:P(A;;GA;;;SY)(A;;GA;;;OW), open c -> 5, open c by=user,
    create t by=user
an entry for what is created below counts for nothing here [DOCS: ACE strings]
    create s sddl=D:P(A;;GA;;;BA)(A;OICIIO;GA;;;WD), open c by=user -> 5
an entry that denies counts where it comes first [DOCS: order of ACEs in a DACL]
    create s sddl=D:(D;;0x1;;;BU)(A;;GA;;;BA)(A;;GA;;;WD), open c r by=user -> 5, open c w by=user

# go-winio's own tests (pipe_test.go), as far as they are about the kernel.
TestDialListenerTimesOut: busy is busy [WINIO: pipe_test.go]
    pair s c limit=1, open d -> 231, open d -> 231
TestAbortedAccept: closing ends the accept [WINIO: pipe_test.go]
    create s, connect s as k -> 997, cancel s k, wait k -> 995 0, close s, open c -> 2
TestConnectRace: the client comes before the connect [WINIO: pipe_test.go]
    create s, open c, connect s -> 535, read s 9 as r -> 997, write c ab, wait r -> 0 2 ab
TestEchoWithMessaging: messages, then end of file [WINIO: pipe_test.go]
    pair s c message-reads quota=65536, write c abc, write c de, write c nothing, read s 99 as r,
    result r -> 0 3 abc, read s 99 as r, result r -> 0 2 de, read s 99 as r, result r -> 0 0
TestCloseReadRace, TestCloseAbortsListen: an end closes under a read [WINIO: pipe_test.go]
    pair s c, read c 9 as r -> 997, cancel c r, wait r -> 995 0, close c, read s 9 -> 109
TestMessageReadMode: a message in pieces [WINIO: pipe_test.go]
    pair s c message-reads quota=65536, write c 20*a, read s 8 as r -> 234,
    result r -> 234 8 aaaaaaaa, read s 8 as r -> 234, read s 8 as r, result r -> 0 4 aaaa
TestCloseWriteEOF: nothing but an end [WINIO: pipe_test.go]
    pair s c quota=65536, write c nothing, read s 9 as r, result r -> 0 0
TestTimeoutPendingRead: the deadline comes, then data [WINIO: pipe_test.go]
    pair s c, read s 9 as r -> 997, wait r 50 -> 258, cancel s r, wait r -> 995 0,
    write c abc as w -> 997, read s 9 as q, result q -> 0 3 abc, wait w -> 0 3
TestTimeoutPendingWrite: nobody reads [WINIO: pipe_test.go]
    pair s c, write s abc as w -> 997, wait w 50 -> 258, cancel s w, wait w -> 995 0,
    read c 9 as r -> 997
TestDisconnect: the server throws the client out [WINIO: pipe_test.go]
    pair s c quota=9, write s abc, disconnect s, read c 9 -> 233
"""


class Step(NamedTuple):
    """What is called, and what Windows and Wine answer: one of these."""

    call: str
    windows: list[str]
    wine: list[str]


class History(NamedTuple):
    """A history: its name, where its answers are from, and its steps."""

    name: str
    source: str
    steps: list[Step]

    def is_real(self) -> bool:
        """Tell whether it can be run on a real kernel: it takes one user."""
        return not any(" by=" in step.call for step in self.steps)


def _read_table() -> list[History]:
    found: list[History] = []
    steps = re.compile(r"(.+?)(?: -> (.*?))?(?: \(wine: (.*?)\))?(?:, |,?$)")
    for line in TABLE.splitlines():
        if line.startswith("    "):
            for call, windows, wine in steps.findall(line.strip()):
                answers = (windows or "0").split(" or ")
                found[-1].steps.append(Step(call, answers, wine.split(" or ") if wine else answers))
        elif line and not line.startswith("#"):
            name, _, source = line.partition(" [")
            found.append(History(name, source.rstrip("]"), []))
    return found


HISTORIES = _read_table()

# ---- Running them -------------------------------------------------------------------------------

DWORD = ctypes.c_uint32
INVALID = ctypes.c_void_p(-1).value
PENDING = 0x103


class OVERLAPPED(ctypes.Structure):
    """As in minwinbase.h."""

    _fields_ = [
        ("Internal", ctypes.c_size_t),
        ("InternalHigh", ctypes.c_size_t),
        ("Offset", DWORD),
        ("OffsetHigh", DWORD),
        ("hEvent", ctypes.c_void_p),
    ]


class SecurityAttributes(ctypes.Structure):
    """SECURITY_ATTRIBUTES."""

    _fields_ = [
        ("nLength", DWORD),
        ("lpSecurityDescriptor", ctypes.c_void_p),
        ("bInheritHandle", ctypes.c_int32),
    ]


class Api:
    """What the histories are run on: functions, threads and time."""

    functions: Any
    functions_of: Callable[[str], Any]  # another account's
    last_error: Callable[[], int]
    start: Callable[[Callable[[], None]], None]
    sleep: Callable[[float], None]


class Started(NamedTuple):
    """An operation that has been started, with all that it needs until it ends."""

    kind: str
    handle: Any
    overlapped: OVERLAPPED
    buffer: Any
    event: Any


class Steps:
    """Runs one history, step by step. Each returns the error, and what else came of it."""

    def __init__(self, api: Api, path: str) -> None:
        self.api = api
        self.call = api.functions
        self.path = path
        self.handles: dict[str, Any] = {}
        self.started: dict[str, Started] = {}
        self.threads: dict[str, list[str]] = {}

    def run(self, line: str) -> str:
        """Run one step and return what came of it."""
        words = line.split()
        step: Callable[..., str] = getattr(self, f"do_{words[0]}")
        return step(*words[1:])

    def _code(self, succeeded: Any) -> str:
        return "0" if succeeded else str(self.api.last_error())

    def _path(self, path: str) -> str:
        return path.replace("%", self.path).replace("_", " ")

    def _keep(self, name: str, handle: Any) -> str:
        if handle in (None, 0, INVALID):
            return str(self.api.last_error())
        self.handles[name] = handle
        return "0"

    def _functions_by(self, given: dict[str, str]) -> Any:
        return self.api.functions_of(given["by"]) if "by" in given else self.call

    def do_create(self, name: str, *options: str) -> str:
        """create NAME [byte|message-reads] [in|out] [first] [sync] [reject-remote] [quota=N] …"""
        given = _given(options)
        call = self._functions_by(given)
        access = 1 if "in" in options else 2 if "out" in options else 3
        first = 0x80000 if "first" in options else 0
        pipe_mode = 0 if "byte" in options else 4
        pipe_mode |= 2 if "message-reads" in options else 0
        pipe_mode |= 8 if "reject-remote" in options else 0
        attributes = None
        pointer = ctypes.c_void_p()
        if "sddl" in given:
            convert = call.ConvertStringSecurityDescriptorToSecurityDescriptorW
            convert(given["sddl"], 1, ctypes.byref(pointer), None)
            size = ctypes.sizeof(SecurityAttributes)
            attributes = ctypes.byref(SecurityAttributes(size, pointer.value, 0))
        quota = given.get("quota", "0")
        handle = call.CreateNamedPipeW(
            self._path(given.get("path", "\\\\.\\pipe\\%")),
            access | first | (0 if "sync" in options else 0x40000000),
            pipe_mode,
            int(given.get("limit", "255")),
            int(given.get("out", quota)),
            int(given.get("in", quota)),
            int(given.get("timeout", "0")),
            attributes,
        )
        result = self._keep(name, handle)
        if attributes is not None:
            call.LocalFree(pointer)
        return result

    def do_open(self, name: str, *options: str) -> str:
        """open NAME [r|w|none] [sync] [path=…] [by=…]"""
        given = _given(options)
        kinds = {"r": 0x80000000, "w": 0x40000000, "none": 0}
        access = next((kinds[option] for option in options if option in kinds), 0xC0000000)
        flags = 0x00100000 | (0 if "sync" in options else 0x40000000)
        path = self._path(given.get("path", "\\\\.\\pipe\\%"))
        open_ = self._functions_by(given).CreateFileW
        return self._keep(name, open_(path, access, 0, None, 3, flags, None))

    def do_pair(self, server: str, client: str, *options: str) -> str:
        """pair SERVER CLIENT [options of create]: both ends of an instance"""
        first = self.do_create(server, *options)
        return first if first != "0" else self.do_open(client)

    def do_close(self, name: str) -> str:
        """close NAME: a handle"""
        return self._code(self.call.CloseHandle(self.handles[name]))

    def do_disconnect(self, name: str) -> str:
        """disconnect NAME"""
        return self._code(self.call.DisconnectNamedPipe(self.handles[name]))

    def do_flush(self, name: str) -> str:
        """flush NAME"""
        return self._code(self.call.FlushFileBuffers(self.handles[name]))

    def do_waitpipe(self, milliseconds: str, path: str = "\\\\.\\pipe\\%") -> str:
        """waitpipe MILLISECONDS: WaitNamedPipe"""
        return self._code(self.call.WaitNamedPipeW(self._path(path), int(milliseconds)))

    # Operations. They have an event of their own, but for `without-event` and `on EVENT`, and with
    # `sync` no OVERLAPPED.

    def _begin(self, kind: str, handle: str, words: tuple[str, ...], buffer: Any) -> Started:
        name = words[words.index("as") + 1] if "as" in words else f"{handle}.{kind}"
        event = None
        if "on" in words:
            event = self.handles[words[words.index("on") + 1]]
        elif "without-event" not in words:
            self.do_event(f"event of {name}")
            event = self.handles[f"event of {name}"]
        again = self.started[name].overlapped if "again" in words else None
        overlapped = again or OVERLAPPED(hEvent=event)
        started = Started(kind, self.handles[handle], overlapped, buffer, event)
        self.started[name] = started
        return started

    def do_connect(self, handle: str, *words: str) -> str:
        """connect HANDLE [as NAME]"""
        if "sync" in words:
            return self._code(self.call.ConnectNamedPipe(self.handles[handle], None))
        started = self._begin("connect", handle, words, None)
        return self._code(self.call.ConnectNamedPipe(started.handle, started.overlapped))

    def do_read(self, handle: str, size: str, *words: str, count: Any = None) -> str:
        """read HANDLE SIZE [as NAME]; with sync: the error, the count, the data"""
        buffer = (ctypes.c_char * max(1, int(size)))()
        if "sync" in words:
            told = DWORD()
            pointer = ctypes.byref(told)
            succeeded = self.call.ReadFile(self.handles[handle], buffer, int(size), pointer, None)
            return f"{self._code(succeeded)} {_show(told.value, buffer)}"
        started = self._begin("read", handle, words, buffer)
        read = self.call.ReadFile
        return self._code(read(started.handle, buffer, int(size), count, started.overlapped))

    def do_readcount(self, handle: str, size: str, *words: str) -> str:
        """readcount HANDLE SIZE: as read, with the direct count as well"""
        count = DWORD(99)
        code = self.do_read(handle, size, *words, count=ctypes.byref(count))
        return f"{code} {count.value}"

    def do_write(self, handle: str, data: str, *words: str) -> str:
        """write HANDLE DATA [as NAME]: DATA may be `nothing`, or `100*a`; with sync: the count"""
        written = _data(data)
        size = len(written)
        if "sync" in words:
            told = DWORD()
            pointer = ctypes.byref(told)
            succeeded = self.call.WriteFile(self.handles[handle], written, size, pointer, None)
            return f"{self._code(succeeded)} {told.value}"
        started = self._begin("write", handle, words, written)
        return self._code(
            self.call.WriteFile(started.handle, written, size, None, started.overlapped)
        )

    def do_result(self, name: str) -> str:
        """result NAME: how an operation ended, by its OVERLAPPED; 996 if it hasn't"""
        started = self.started[name]
        status, count = started.overlapped.Internal, started.overlapped.InternalHigh
        if status == PENDING:
            return "996"
        code = self.call.RtlNtStatusToDosError(status)
        return f"{code} {_show(count, started.buffer if started.kind == 'read' else None)}"

    def do_wait(self, name: str, milliseconds: str = "2000") -> str:
        """wait NAME [MILLISECONDS]: how an operation ended, after a wait; 258 if it didn't"""
        started = self.started[name]
        handle = started.event or started.handle
        failed = self.call.WaitForSingleObject(handle, int(milliseconds))
        return str(failed) if failed else self.do_result(name)

    def do_internal(self, name: str) -> str:
        """internal NAME: OVERLAPPED.Internal and InternalHigh"""
        overlapped = self.started[name].overlapped
        return f"{overlapped.Internal:#x} {overlapped.InternalHigh}"

    def do_cancel(self, handle: str, name: str) -> str:
        """cancel HANDLE OPERATION|all"""
        overlapped = None if name == "all" else self.started[name].overlapped
        return self._code(self.call.CancelIoEx(self.handles[handle], overlapped))

    # Events and threads.

    def do_event(self, name: str, *options: str) -> str:
        """event NAME [auto]: make one, which resets itself or doesn't"""
        event = self.call.CreateEventW(None, "auto" not in options, False, None)
        return self._keep(name, event)

    def do_set(self, name: str) -> str:
        """set EVENT"""
        return self._code(self.call.SetEvent(self.handles[name]))

    def do_signaled(self, name: str, milliseconds: str = "0") -> str:
        """signaled NAME [MILLISECONDS]: whether an operation's event, or a handle, is signaled"""
        handle = self.started[name].event if name in self.started else self.handles[name]
        return "no" if self.call.WaitForSingleObject(handle, int(milliseconds)) else "yes"

    def do_start(self, name: str, *words: str) -> str:
        """start NAME STEP: run a step in a thread of its own"""
        results = self.threads[name] = []
        self.api.start(lambda: results.append(self.run(" ".join(words))))
        self.api.sleep(0.03)
        return "0"

    def do_asleep(self, name: str) -> str:
        """asleep NAME: whether that thread's step goes on"""
        self.api.sleep(0.03)
        return "no" if self.threads[name] else "yes"

    def do_join(self, name: str) -> str:
        """join NAME: what came of a thread's step"""
        for _ in range(200):
            if self.threads[name]:
                return self.threads[name][0]
            self.api.sleep(0.01)
        return "asleep"

    def do_sddl(self, text: str, revision: str = "1") -> str:
        """sddl TEXT [REVISION]"""
        pointer = ctypes.c_void_p()
        succeeded = self.call.ConvertStringSecurityDescriptorToSecurityDescriptorW(
            "" if text == "empty" else text, int(revision), ctypes.byref(pointer), None
        )
        code = self._code(succeeded)
        if succeeded and self.call.LocalFree(pointer):
            return "not freed"
        return code


def _given(options: tuple[str, ...]) -> dict[str, str]:
    return dict(option.split("=", 1) for option in options if "=" in option)


def _data(text: str) -> bytes:
    if text == "nothing":
        return b""
    count, star, letter = text.partition("*")
    return letter.encode() * int(count) if star else text.encode()


def _show(count: int, buffer: Any) -> str:
    if buffer is None or not count:
        return str(count)
    data = buffer.raw[:count].decode("ascii", "replace")
    return f"{count} {data if count <= 20 else data[0] + '...'}"


def run_history(history: History, api: Api, path: str) -> list[str]:
    """Run a history and return what came of each step."""
    steps = Steps(api, path)
    results = [steps.run(step.call) for step in history.steps]
    closed = {step.call.split()[1] for step in history.steps if step.call.startswith("close ")}
    for name, handle in steps.handles.items():
        if name not in closed:
            api.functions.CloseHandle(handle)
    return results


def compare(history: History, api: Api, path: str, *, wine: bool) -> list[str]:
    """Run a history; return where an answer isn't what it should be."""
    wrong = []
    for step, result in zip(history.steps, run_history(history, api, path)):
        # A later Wine may do as Windows does.
        if result not in step.windows and not (wine and result in step.wine):
            expected = " or ".join(step.wine if wine else step.windows)
            wrong.append(f"{history.name}: {step.call} -> {result}, not {expected}")
    return wrong


# ---- On the real kernel -------------------------------------------------------------------------

_H = ctypes.c_void_p
_W = ctypes.c_wchar_p
_N = ctypes.POINTER(DWORD)
_O = ctypes.POINTER(OVERLAPPED)
_B = ctypes.c_int32
_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "CreateNamedPipeW": (_H, _W, *[DWORD] * 6, _H),
    "CreateFileW": (_H, _W, DWORD, DWORD, _H, DWORD, DWORD, _H),
    "CreateEventW": (_H, _H, _B, _B, _W),
    "SetEvent": (_B, _H),
    "CloseHandle": (_B, _H),
    "ConnectNamedPipe": (_B, _H, _O),
    "DisconnectNamedPipe": (_B, _H),
    "ReadFile": (_B, _H, _H, DWORD, _N, _O),
    "WriteFile": (_B, _H, _H, DWORD, _N, _O),
    "FlushFileBuffers": (_B, _H),
    "WaitNamedPipeW": (_B, _W, DWORD),
    "WaitForSingleObject": (DWORD, _H, DWORD),
    "CancelIoEx": (_B, _H, _O),
    "ConvertStringSecurityDescriptorToSecurityDescriptorW": (_B, _W, DWORD, _H, _H),
    "LocalFree": (_H, _H),
    "RtlNtStatusToDosError": (DWORD, DWORD),
}


class _Functions:
    """Holds the functions of several libraries under their names."""


def real_api() -> Api:
    """Return Windows' own functions."""
    import threading
    import time

    api = Api()
    api.last_error = lambda: 0
    if sys.platform == "win32":
        libraries = [
            ctypes.WinDLL(name, use_last_error=True) for name in ("kernel32", "advapi32", "ntdll")
        ]
        api.functions = _Functions()
        for name, (restype, *argtypes) in _PROTOTYPES.items():
            function = next(getattr(dll, name) for dll in libraries if hasattr(dll, name))
            function.restype = restype
            function.argtypes = argtypes
            setattr(api.functions, name, function)
        api.last_error = ctypes.get_last_error
    api.start = lambda step: threading.Thread(target=step, daemon=True).start()
    api.sleep = time.sleep
    return api


def main() -> int:
    """Run the histories on the kernel that this Python runs on."""
    api = real_api()
    wine = hasattr(ctypes.CDLL("ntdll"), "wine_get_version")
    wrong = []
    histories = [history for history in HISTORIES if history.is_real()]
    for number, history in enumerate(histories):
        wrong += compare(history, api, f"vmshim-history-{number}", wine=wine)
    for line in wrong:
        print(line)
    print(f"{len(histories)} histories on {'Wine' if wine else 'Windows'}, {len(wrong)} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
