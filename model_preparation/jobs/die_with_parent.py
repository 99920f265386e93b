"""`python die_with_parent.py PARENT COMMAND...`: become COMMAND, and be killed when the process PARENT ends.

So a killed worker or batch leaves no running build or evaluation. On Linux only: the kernel does it (prctl(2),
PR_SET_PDEATHSIG, which outlives exec). process.py starts this file; it imports nothing of ours, to be quick.
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
    if os.getppid() != parent:  # it has ended already
        sys.exit(1)
    os.execv(command[0], command)
