"""`python die_with_parent.py PARENT COMMAND...`: become COMMAND, and be killed when the process PARENT ends.

So a worker or a batch that is killed leaves no build or evaluation behind it. The kernel does it (prctl(2),
PR_SET_PDEATHSIG, which outlives exec), on Linux only. Started by process.py; it imports nothing of ours, to be quick.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        sys.exit(1)
    os.execv(command[0], command)
