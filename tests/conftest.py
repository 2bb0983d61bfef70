"""Puts the repository's root on the import path: the tests import the shipped files as a user does."""
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for tiny networks, threads only wait
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
