"""For every test: no TAILRACE_* variable of the caller's shell leaks in, and compute threads do not fight."""

import os

for _name in [name for name in os.environ if name.startswith("TAILRACE_")]:
    del os.environ[_name]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Processes are forked beside gRPC's threads and exec at once: its handlers would abort a child now and then.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
