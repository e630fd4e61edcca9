"""Triton comes for Linux only; elsewhere its kernels are neither run nor tested."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["test_compiled.py", "test_interpreted.py"]
