"""Errors that the user can correct, and their text in one line."""

import errno
import re

LONGEST_LINE = 1200  # characters of an error
LONGEST_QUOTE = 160  # characters of a text that a line quotes
# What the system says where permission, space or another thing that is the user's to give is missing.
REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE),
    *(errno.ENODEV, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.ESTALE),  # some file systems
}
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """An error that the user can correct; `run` shows it as one line and ends with exit status 2."""


def as_user_error(error: BaseException) -> BaseException:
    """Return a UserError for what the system refuses, wherever it comes up; any other error as it is."""
    if isinstance(error, OSError) and error.errno in REFUSALS:
        return UserError(f"{error.filename or 'stdout'}: {refusal(error)}")
    if isinstance(error, MemoryError):
        return UserError(f"this machine's memory is too small ({first_line(error)}); make a smaller video")
    return error


IN_TEXT = re.compile(r"([^:]*) \(os error (\d+)\)")  # how safetensors says what the system said


def system_error(error: BaseException) -> int | None:
    """Return the system's number of an error; None if the system has not refused anything."""
    told = IN_TEXT.search(str(error))
    return int(told[2]) if told else getattr(error, "errno", None)


def reason(error: BaseException) -> str:
    """Return why something failed: in the system's own words if it is the system that refused."""
    told = IN_TEXT.search(str(error))
    return told[1].strip() if told else getattr(error, "strerror", None) or first_line(error)


def refusal(error: BaseException) -> str:
    """Return why a path cannot be written, and what helps."""
    remedy = "free some disk space or choose another path" if system_error(error) in NO_SPACE else "choose another path"
    return f"{reason(error)}; {remedy}"


def one_line(text: str) -> str:
    """Return `text` as one line, with escapes for what cannot be printed, and without the middle of a long one."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shortened(shown, LONGEST_LINE)


def shortened(text: str, most: int = LONGEST_QUOTE) -> str:
    """Return `text` without its middle if it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's kind if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def error_message(stderr: str) -> str:
    """Return the message of the one-line error that a program of ours printed last, for who shows it as its own."""
    return stderr.strip().splitlines()[-1].split("error: ", 1)[-1]


class PlanError(ValueError):
    """A plan that cannot be carried out.

    Args:
        field: the field of the plan whose value is wrong; None where the model itself is wrong.
        message: what is wrong with the value, and which values work.
        other: another field that the message names.
    """

    def __init__(self, field: str | None, message: str, other: str | None = None):
        super().__init__(f"{field} {message}" if field else message)
        self.field, self.other = field, other
