"""Configuration: a dataclass per script, a file of plain assignments, `--key=value` on top.

    python train.py config/cpu/seed.py --learning_rate=1e-3

The dataclass gives every key its name, type, default and help text. A config file reads like
Python (`learning_rate = 1e-3  # why`) but is parsed, never executed. Unknown keys and wrong
types are errors that name the file and line and suggest the nearest key.
"""

import ast
import contextlib
import dataclasses
import difflib
import json
import os
import sys

from tqdm import tqdm


class UserError(Exception):
    """A mistake the user can mend: printed as one line, exit code 2, no traceback."""


def key(default, help, choices=None, minimum=None):
    """A dataclass field with a default, a help text and, optionally, the values it may take or the least one."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum})


def _checked(field, value, where):
    """Return `value` as the field's type, or raise UserError. An int is a fine float, nothing else mixes."""
    if field.type is float and type(value) is int:
        value = float(value)
    if type(value) is not field.type:
        raise UserError(f"{where}: {field.name} must be {field.type.__name__}, got {value!r} ({type(value).__name__})")
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise UserError(f"{where}: {field.name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    minimum = field.metadata["minimum"]
    if minimum is not None and not value >= minimum:
        raise UserError(f"{where}: {field.name} must be at least {minimum}, got {value!r}")
    return value


def _field(fields, name, where):
    if name in fields:
        return fields[name]
    near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "--help lists the keys"
    raise UserError(f"{where}: unknown key {name!r}; {hint}")


def _read_file(path, fields):
    """Parse `name = literal` lines of a config file into a dict, checked against the fields."""
    try:
        with open(path) as file:
            tree = ast.parse(file.read())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except SyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: {error.msg}") from None
    values, lines = {}, {}
    for statement in tree.body:
        where = f"{path}:{statement.lineno}"
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        simple = isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
        if not simple or len(statement.targets) > 1:
            raise UserError(f"{where}: a config file holds only lines of the form `key = value`")
        name = statement.targets[0].id
        field = _field(fields, name, where)
        if name in values:
            raise UserError(f"{where}: {name} is set a second time (first on line {lines[name]})")
        try:
            value = ast.literal_eval(statement.value)
        except ValueError:
            raise UserError(f"{where}: {name} must be a plain number, string or True/False") from None
        values[name], lines[name] = _checked(field, value, where), statement.lineno
    return values


def _read_flag(argument, fields):
    """Parse one `--key=value`; the field's type decides how the text is read."""
    name, equals, text = argument[2:].partition("=")
    field = _field(fields, name, argument)
    if not equals:
        raise UserError(f"{argument}: write --{name}=VALUE")
    if field.type is str:
        return name, _checked(field, text, argument)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text  # not a literal: the type check says what was expected
    return name, _checked(field, value, argument)


def _print_help(cls, fields):
    module = sys.modules["__main__"].__spec__  # set when started as `python -m data.prepare`
    script = f"-m {module.name}" if module else sys.argv[0]
    print(f"{cls.__doc__.strip()}\n\nusage: python {script} [config file] [--key=value ...]\n")
    for name, field in fields.items():
        choices = field.metadata["choices"]
        print(f"  --{name} ({field.type.__name__}, default {field.default!r})")
        print(f"      {field.metadata['help']}" + (f"; one of {', '.join(map(repr, choices))}" if choices else ""))


def parse(cls, argv=None):
    """Build a config of dataclass `cls` from an optional config file and `--key=value` flags."""
    argv = sys.argv[1:] if argv is None else argv
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if {"-h", "--help"} & set(argv):
        _print_help(cls, fields)
        raise SystemExit(0)
    values = {}
    for position, argument in enumerate(argv):
        if argument.startswith("--"):
            name, value = _read_flag(argument, fields)
            values[name] = value
        elif position == 0:
            values = _read_file(argument, fields)
        else:
            raise UserError(f"{argument}: one config file comes first, then only --key=value")
    return cls(**values)


def read_json(path, remedy):
    """Read a JSON file, or raise UserError with the remedy when it is missing or damaged."""
    try:
        with open(path) as file:
            return json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {remedy}") from None
    except (ValueError, OSError) as error:
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


def _complain(message):
    """Print to stderr, on a line of its own even when a progress bar was running."""
    for bar in list(tqdm._instances):
        bar.close()
    print(message, file=sys.stderr)


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
    except KeyboardInterrupt:
        _complain("stopped; the same command continues")
        raise SystemExit(130) from None
