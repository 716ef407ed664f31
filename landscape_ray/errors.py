"""The one exception that means: the user can mend this. The command line prints it as a sentence and exits with 2."""

from __future__ import annotations


class UserError(ValueError):
    """Wrong input or surroundings. The message names the thing, the value found and the remedy.

    It carries its message only, so that it survives being pickled between processes.
    """
