"""The one exception that is the user's business, not a bug."""


class UserError(ValueError):
    """A mistake that the user can mend. The message says where, what was found, what was expected and what to do."""


def first_line(error: BaseException) -> str:
    """What another package's error says, short enough to stand inside a message of ours."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
