"""What a user did that cannot work, said in lines that name the thing to type instead."""

import contextlib
import difflib
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence


class UserError(Exception):
    """A mistake in the input. The command line prints its lines and exits with `status`, no traceback."""

    status = 2
    prefix = "error: "
    silent = False  # whether another process says it

    def __init__(self, *lines: str):
        self.lines = tuple(map(_one_line, lines))
        super().__init__("\n".join(self.lines))


def _one_line(text: str) -> str:
    """Return `text` on one line: what a file or an argument brought in must neither break the line, nor steer the
    terminal, nor flood it.
    """
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= 1000 else f"{text[:600]} ... {text[-300:]}"


class ConfigError(UserError):
    """Everything that is wrong with a configuration, one line each."""


class RunFailed(UserError):
    """The input was legal and the run failed: the disk is full, the memory too small, the folder gone."""

    status = 1


class DamagedFile(UserError):
    """A file of ours that no longer holds what was written to it."""


class OtherNetwork(UserError):
    """Weights of another network, or for another number of classes."""


class FolderInUse(UserError):
    """Another process trains in that folder."""


class ProcessLost(RunFailed):
    """Another process of the run is gone."""


class TrainingDiverged(RunFailed):
    """The loss is no longer a finite number."""


class Preempted(UserError):
    """A signal asked the run to stop; what it has done so far is kept, and --resume goes on."""

    status = 75  # EX_TEMPFAIL of sysexits.h: try again later
    prefix = ""


def check_signature(function: Callable, by_place: tuple, by_name: Mapping, what: str, wanted: str) -> None:
    """Raise UserError where `function`, which is `what`, cannot be called with these arguments, as `wanted` says."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # what is written in C has none
        return
    try:
        signature.bind(*by_place, **by_name)
    except TypeError as error:
        raise UserError(f"{what}: {error}; it is called as {wanted}") from None


@contextlib.contextmanager
def users_code(what: str) -> Iterator[None]:
    """Turn an exception of the user's own code inside, or its exit, into a UserError: `what` fails, where and why.

    Others pass: those that no code of the user's had a part in, and those of a machine that lets it down.
    """
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        files = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
        if not files or re.search("alloc|out of memory|deterministic", str(error)):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        line = f"{what} fails{place_of(files)}: {type(error).__name__}: {reason}"
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        section = frame.f_locals.get("self")
        if isinstance(error, AttributeError) and isinstance(section, dict):  # yacs says the key's last word alone
            read = re.search(rf"cfg\.((?:\w+\.)*{re.escape(reason)})\b", files[-1].line or "")
            close = difflib.get_close_matches(reason, section, 1)
            mend = "give it in the YAML, or name in EXPERIMENT.PLUGINS the checkout that has its defaults"
            mend = f"did you mean {close[0]}?" if close else mend
            line = f"{what} reads the key {read[1] if read else reason}, which nothing sets; {mend}"
        raise UserError(line) from error


def place_of(frames: Sequence[traceback.FrameSummary]) -> str:
    """Return the last place, " at FILE:LINE", in the user's own code; empty where there is none."""
    files = [frame for frame in frames if _is_users(frame.filename)]
    return f" at {os.path.relpath(files[-1].filename)}:{files[-1].lineno}" if files else ""


_NOT_THE_USERS = (os.path.dirname(__file__), *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), "<frozen")


def _is_users(file: str) -> bool:
    return not file.startswith(_NOT_THE_USERS)


def run_command(
    main: Callable[[], None], goes_on: str = "a training run goes on from its last checkpoint with --resume auto"
) -> None:
    """Run a command-line tool: a UserError becomes its lines on stderr and its exit status; so does Ctrl-C, after which
    it says how the work `goes_on`. A reader that stops early, as head does, ends it quietly.
    """
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        # of several processes every one sees a mistake in the input: a machine's first one says it
        if not (error.silent or (error.status == 2 and os.environ.get("LOCAL_RANK", "0") != "0")):
            _complain(*(error.prefix + line for line in error.lines))
        raise SystemExit(error.status) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left unsent goes nowhere at exit
        raise SystemExit(141) from None  # as of a process that SIGPIPE ended
    except KeyboardInterrupt:
        _complain(f"interrupted; {goes_on}")
        raise SystemExit(130) from None


def _complain(*lines: str) -> None:
    """Print to stderr, where somebody still reads that: the exit status must not depend on it."""
    try:
        for line in lines:
            print(line, file=sys.stderr)
        sys.stderr.flush()
    except (OSError, AttributeError):  # a pipe or terminal that is gone; None: closed by the caller
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
