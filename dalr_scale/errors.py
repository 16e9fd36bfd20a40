"""Errors that a user meets: wrong input, and training that cannot continue."""


class UserError(ValueError):
    """A wrong setting, file or argument; commands print it as one line and exit with status 2."""


class TrainingError(RuntimeError):
    """Training cannot continue; the message names step and cause."""
