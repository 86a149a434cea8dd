"""The errors a user can cause: one line each, naming place, value and next command, with the exit code of the house.

Exit codes: 0 go; 1 failure; 2 bad input; 3 ran to its end, a gate says no-go; 129/130/143 interrupted (resumable).
"""

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_NO_GO = 3
EXIT_HANGUP, EXIT_CTRL_C, EXIT_TERMINATED = 129, 130, 143


class UserError(Exception):
    """A fault that the user can mend. `str(error)` is one line: place, value, what is wrong."""

    exit_code = EXIT_FAILURE

    def __init__(self, message: str, next_step: str = "") -> None:
        """`next_step` is the command or change that mends it; it is printed after the message."""
        super().__init__(f"{message}; {next_step}" if next_step else message)


class BadInputError(UserError, ValueError):
    """A file, flag, field or setting that cannot be used as given (exit code 2)."""

    exit_code = EXIT_BAD_INPUT


class DiskError(UserError, OSError):
    """No space or a failing disk while writing (exit code 1); what stands on disk is whole."""

    exit_code = EXIT_FAILURE

    def __str__(self) -> str:
        return str(self.args[0])


class EngineError(UserError, RuntimeError):
    """A model that could not be loaded or run (exit code 1)."""

    exit_code = EXIT_FAILURE


class Interrupted(UserError):
    """A signal stopped the run; the same command resumes it."""

    def __init__(self, exit_code: int, next_step: str) -> None:
        super().__init__("interrupted; everything finished so far is kept", next_step)
        self.exit_code = exit_code
