"""The one kind of error that a script's user can set right. Needs nothing that takes time to import."""


class UsageError(ValueError):
    """The user asked for what cannot be. The text names the value and the way out."""
