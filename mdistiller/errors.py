"""What a user did that cannot work, said in lines that name the thing to type instead."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in the input. The command line prints its lines and exits with `status`, no traceback."""

    status = 2
    prefix = "error: "

    def __init__(self, *lines: str):
        super().__init__("\n".join(lines))
        self.lines = lines


class ConfigError(UserError):
    """Everything that is wrong with a configuration, one line each."""


class RunFailed(UserError):
    """The input was legal and the run failed: the disk is full, the memory too small, the folder gone."""

    status = 1


class TrainingDiverged(RunFailed):
    """The loss is no longer a finite number."""


class Preempted(UserError):
    """A signal asked the run to stop; what it has done so far is kept, and --resume goes on."""

    status = 75  # EX_TEMPFAIL of sysexits.h: try again later
    prefix = ""


def run_command(main: Callable[[], None]) -> None:
    """Run a command-line tool: a UserError becomes its lines on stderr and its exit status; so does Ctrl-C."""
    try:
        main()
    except UserError as error:
        for line in error.lines:
            print(f"{error.prefix}{line}", file=sys.stderr)
        raise SystemExit(error.status) from None
    except KeyboardInterrupt:
        print("interrupted; a training run goes on from its last checkpoint with --resume auto", file=sys.stderr)
        raise SystemExit(130) from None
