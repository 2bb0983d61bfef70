"""Puts the repository's root on the import path: the tests import the shipped files as a user does."""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for tiny networks, threads only wait

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
