"""Files that are written whole or not at all, and read with an error that says what to do."""

import contextlib
import json
import os

from common.errors import UserError


def read_json(path, remedy):
    """Read a JSON file, or raise UserError with the remedy when it is missing or damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {remedy}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from None


@contextlib.contextmanager
def atomic_file(path):
    """A binary file to write whose content replaces `path` at the end: a crash leaves the old content or the new."""
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
        raise UserError(f"{path} could not be written ({reason}); {kept}; free some space and run again") from None


def write_atomically(path, data):
    """Write text or bytes to `path`, all or nothing."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_json(path, value, indent=1):
    write_atomically(path, json.dumps(value, indent=indent) + "\n")
