"""The service: ingress, head replicas, expert workers, controller, SDK and command line."""

import os

PROTOCOL_VERSION = 3
"""Version of both protos. Raised whenever an older peer would misread a newer one."""

# Compute threads that have nothing to do look for more: by GNU OpenMP's default for some 17 ms, in
# which a head's keep the first worker that it wakes on the head's own core, so that the second is
# asked milliseconds later (tests/bench/RESULTS.md). This is 0.2 ms, longer than pauses within a
# layer are. It is read when torch is loaded, hence here.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
