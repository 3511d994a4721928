"""The service: ingress, head replicas, expert workers, controller, SDK and command line."""

PROTOCOL_VERSION = 3
"""Version of both protos. Raised whenever an older peer would misread a newer one."""
