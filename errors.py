"""The errors a user can cause, each saying what was wrong, what was expected and what to do.

The command line prints their text as one line and exits with status 2. Anything else that
escapes is a bug in pocketslm.
"""


class PocketSlmError(Exception):
    """Base of every error that pocketslm raises on purpose."""


class CheckpointError(PocketSlmError):
    """A checkpoint file is missing, truncated, hostile or of an unsupported kind."""


class UnknownArchitectureError(CheckpointError):
    """The checkpoint's architecture has no definition here."""


class BundleError(PocketSlmError):
    """A bundle is incomplete, altered, of an unknown version or points outside itself."""


class TokenizerError(PocketSlmError):
    """Tokenizer files are missing or describe something that is not supported."""


class ContextOverflowError(PocketSlmError):
    """Prompt plus new tokens do not fit the context that the graph was built for."""


class ExportError(PocketSlmError):
    """An export cannot be done as asked, or could not be written."""


class FetchError(PocketSlmError):
    """A catalog entry is unknown, unreachable or does not match its SHA-256."""


class BackendError(PocketSlmError):
    """A runtime backend is not installed or cannot run this bundle."""


class DocumentError(PocketSlmError):
    """A document or library is missing, damaged, hostile, locked or of an unknown kind."""


class LockedError(DocumentError):
    """A document needs a password, or another one."""


class UsageError(PocketSlmError):
    """An option or argument has a value that makes no sense."""


class DeviceError(PocketSlmError):
    """A device is out of reach, refuses, is full, or its connection or program was lost."""
