"""Define the one exception that a user sees."""


class UserError(Exception):
    """A mistake that the user can fix. Its text is one line that says what is wrong and how to fix it.

    `utils.runtime.flags.run` prints the text on stderr and exits with 1, without a traceback.
    """
