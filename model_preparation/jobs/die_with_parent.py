"""`python die_with_parent.py PARENT COMMAND...`: runs COMMAND in this process, which is killed when PARENT ends.

PARENT is a process id. If a worker or the user's command is killed, its builds and evaluations end too. This
works on Linux only, by prctl(2) with PR_SET_PDEATHSIG, which stays set after exec. process.py runs this file.
To start quickly, it imports little.
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
    if os.getppid() != parent:  # PARENT has ended already
        sys.exit(1)
    os.execv(command[0], command)
