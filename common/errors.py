"""Mistakes that the user can fix, reported in one line without a traceback; and files written whole or not at all."""

import contextlib
import errno
import json
import os
import sys

from tqdm import tqdm


class UserError(Exception):
    """A mistake the user can fix; its text says what is wrong and what to do."""


def printable(text):
    """The text with control characters escaped, so that no name can move the cursor or colour the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _complain(message):
    """Print to stderr, on a line of its own even when a progress bar was running."""
    for bar in list(tqdm._instances):
        bar.close()
    print(printable(message), file=sys.stderr)


def _is_out_of_memory(error):
    """True for Python's MemoryError, and for what torch raises when a CPU or GPU runs out of memory."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def command(main):
    """Run a script's main function; a mistake that the user can fix becomes one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError):  # if a stream is neither a terminal nor a file
            stream.reconfigure(errors="backslashreplace")  # escapes what a terminal cannot show, as \xe9
    try:
        main()
        sys.stdout.flush()  # so that a full disk shows here, not when Python has ended
    except (Exception, KeyboardInterrupt) as error:
        _end(error)


def _end(error):
    """End the process as the error demands, or raise it again."""
    code = 2
    if isinstance(error, UserError):
        _complain(f"error: {error}")
    elif isinstance(error, BrokenPipeError):  # the reader has seen enough, as in `python sample.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discards what is still buffered
        code = 1
    elif isinstance(error, OSError):  # a folder that cannot be made or read, say
        _complain(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}")
    elif isinstance(error, (MemoryError, RuntimeError)) and _is_out_of_memory(error):
        sizes = "--micro_batch_size, --sequence_length or the model's sizes, or use --checkpoint_activations=True"
        _complain(f"error: out of memory; lower {sizes} (whichever this script has)")
    elif isinstance(error, KeyboardInterrupt):
        _complain("stopped; run the same command to continue")
        code = 130
    else:
        raise error
    raise SystemExit(code) from None


# ---- files ----

NOT_HERE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # not a lack of space


def plain_path(path):
    """The shortest form of a path, relative if it is below the current folder: "./out/seed/" -> "out/seed"."""
    here = os.getcwd() + os.sep
    return os.path.normpath(path.removeprefix(here)) if path else path


def read_json(path, remedy):
    """Read a JSON file, or raise UserError with the remedy when it is missing or damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {remedy}") from None
    except (ValueError, RecursionError) as error:  # not OSError: the remedy does not help with another user's file
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from None


@contextlib.contextmanager
def atomic_file(path):
    """A binary file to write, which replaces `path` at the end: a crash leaves either the old content or the new."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        kept = "the previous one is intact" if os.path.exists(path) else "nothing was written"
        elsewhere = getattr(error, "errno", None) in NOT_HERE
        remedy = "choose another place" if elsewhere else "free some space and run again"
        raise UserError(f"{path} could not be written ({reason}); {kept}; {remedy}") from None


def write_atomically(path, data):
    """Write text or bytes to `path`, all or nothing."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path, value, indent=1):
    write_atomically(path, json.dumps(value, indent=indent) + "\n")
