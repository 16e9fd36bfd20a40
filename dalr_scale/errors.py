"""Errors that are the user's to mend."""


class UserError(ValueError):
    """A wrong setting, file or argument; commands print it as one line and exit with status 2."""
