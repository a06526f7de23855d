"""The exceptions that mean: what the person gave us is wrong."""


class InputError(Exception):
    """The person's input (config, data, paths) is wrong.

    The message is one or two lines: the value, what is allowed, and the remedy. Commands print it without a
    traceback and exit with code 2.
    """


class LayoutError(InputError):
    """Every row is sound, but no run can be made of them as the config says: nothing or too little would be left."""
