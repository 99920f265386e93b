import os
import sys

# Else each of the thousands of processes that the tests start would compile all files again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
