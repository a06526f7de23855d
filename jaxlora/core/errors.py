"""The one exception that means: what the person gave us is wrong."""


class InputError(Exception):
    """The person's input (config, data, paths) is wrong.

    The message is one or two lines: the value, what is allowed, and the remedy. Commands print it without a
    traceback and exit with code 2.
    """
