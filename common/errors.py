"""Mistakes that the user can mend, and how every script reports them: one line on stderr, exit code 2, no traceback."""

import os
import sys

from tqdm import tqdm


class UserError(Exception):
    """A mistake the user can mend; its text names the thing and the remedy."""


def printable(text):
    """The text with control characters written out, so that no name can move the cursor or colour the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _complain(message):
    """Print to stderr, on a line of its own even when a progress bar was running."""
    for bar in list(tqdm._instances):
        bar.close()
    print(printable(message), file=sys.stderr)


def _is_out_of_memory(error):
    """True for Python's MemoryError and for what torch raises when a CPU or a GPU has no room."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def command(main):
    """Run a script's main function; a UserError becomes one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        _complain(f"error: {error}")
        raise SystemExit(2) from None
    except BrokenPipeError:  # the reader has seen enough, as in `python sample.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        raise SystemExit(1) from None
    except OSError as error:  # a folder that cannot be made or read, say
        _complain(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}")
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        sizes = "--micro_batch_size, --sequence_length or the model's sizes, or use --checkpoint_activations=True"
        _complain(f"error: out of memory; lower {sizes} (whichever this script has); --dry_run=True counts before")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        _complain("stopped; the same command continues")
        raise SystemExit(130) from None
