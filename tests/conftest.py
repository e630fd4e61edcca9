"""For every test: no TAILRACE_* variable of the caller's shell leaks in, and compute threads do not fight."""

import os

for _name in [name for name in os.environ if name.startswith("TAILRACE_")]:
    del os.environ[_name]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
