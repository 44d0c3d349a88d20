"""The error that a person who runs ropool can mend: the command line prints it as one line."""

from __future__ import annotations


class RopoolError(Exception):
    """A model, prompt or option that cannot be served; the message says what came and what is
    allowed."""
