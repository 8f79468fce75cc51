"""The first process of a machine of the tests: collects the processes that lost their parent.

Processes of a machine die with it: the kernel ends a process namespace with its first process.
"""

import os
import signal

signal.signal(signal.SIGCHLD, lambda number, frame: None)  # so that pause() returns
while True:
    try:
        os.waitpid(-1, 0)
    except ChildProcessError:
        signal.pause()
