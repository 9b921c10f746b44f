"""The one exception for a user's mistake: it becomes a message and exit code 2, never a traceback. Exit codes by name."""

FAILED, BAD_INPUT, PREEMPTED = 1, 2, 75
"""Exit codes of every command: failed; bad input; stopped from outside after a good save."""


class InputError(ValueError):
    """Bad input: a config key, a file, a line in a file.

    Carries every problem found, so that a user mends all of them at once. Each problem is one sentence or two that say
    what must hold, what was got, and what to do.
    """

    def __init__(self, *problems: str) -> None:
        if not problems:
            raise ValueError("InputError needs at least one problem")
        super().__init__("\n".join(problems))
        self.problems = problems
