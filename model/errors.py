"""The one exception that is the user's business, not a bug."""


class UserError(ValueError):
    """A mistake that the user can mend. The message says where, what was found, what was expected and what to do."""
