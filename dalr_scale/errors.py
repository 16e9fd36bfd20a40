"""Errors that a user meets: wrong input, and training that cannot go on."""


class UserError(ValueError):
    """A wrong setting, file or argument; commands print it as one line and exit with status 2."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message names step and cause."""
