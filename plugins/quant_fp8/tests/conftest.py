"""`fp8_case.py` is shared by the tests of this folder and of `interpreted/`; pytest's importlib mode adds no paths."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
