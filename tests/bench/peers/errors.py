class PeerError(Exception):
    """A peer cannot be installed or measured. The message says why; the others go on."""
