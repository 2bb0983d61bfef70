"""Puts the repository's root on the import path: the tests import the shipped files as a user does."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
