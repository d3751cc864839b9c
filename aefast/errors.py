"""What aefast raises for its users' mistakes."""


class AefastError(Exception):
    """Base of all errors that aefast raises itself."""


class InputError(AefastError, ValueError):
    """An argument has the wrong shape, dtype, device or value; the message names it."""


class BackendError(AefastError, RuntimeError):
    """A backend that was asked for by name cannot serve the call; the message says why."""
