"""Logging of the processes we start ourselves. Ray and Serve set up their own."""

import logging

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_up(*, verbose: bool) -> None:
    """Warnings and worse to standard error; with `verbose`, our own progress too."""
    logging.basicConfig(format=FORMAT, level=logging.WARNING)
    if verbose:
        for package in ("cluster", "model"):
            logging.getLogger(package).setLevel(logging.INFO)
