"""The one exception that a user sees."""


class UserError(Exception):
    """A mistake that the user can mend; its text is one line that names the mend.

    `utils.arguments.run` prints the text on stderr and exits with 1, without a traceback.
    """
