"""The one error for input that cannot be used: its message says what is wrong and what to do; programs exit with 2."""


class InputError(ValueError):
    """Data, a model, a recipe or a folder that a user can mend."""
