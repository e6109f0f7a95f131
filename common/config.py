"""Configuration: a dataclass per script, a file of plain assignments, `--key=value` on top.

    python train.py config/cpu/seed.py --learning_rate=1e-3

The dataclass gives every key its name, type, default, range and help text. A config file reads like
Python (`learning_rate = 1e-3  # why`) but is parsed, never executed. Unknown keys, wrong types and values
out of range are errors that name the file and line and suggest the nearest key.
"""

import ast
import dataclasses
import difflib
import math
import os
import re
import sys

from common.errors import UserError, plain_path, printable


def key(default, help, choices=None, within=None, free_text=False):
    """A dataclass field with a default and a help text.

    choices: the values it may take. within: an interval in mathematical notation, such as "[0, 1)" or "[1, inf)".
    free_text: whether a string may hold anything; other strings are names and paths, have no control characters, and
    may use ~/ for the home folder.
    """
    extras = {"help": help, "choices": choices, "within": within, "free_text": free_text}
    return dataclasses.field(default=default, metadata=extras)


def split_list(text):
    """'a, b,' -> ['a', 'b']"""
    return [part.strip() for part in text.split(",") if part.strip()]


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
            name, equals, text = argument[2:].partition("=")
            field = fields.get(name) or _unknown(name, fields, argument)
            if not equals and field.type is not bool:
                raise UserError(f"{argument}: write --{name}=VALUE")
            text = text if equals else "True"  # --overwrite is --overwrite=True
            values[name] = _checked(field, text if field.type is str else _literal(text), argument)
        elif position == 0:
            values = _read_file(argument, fields)
        else:
            raise UserError(f"{argument}: give one config file first, then only --key=value")
    return cls(**values)


def _read_file(path, fields):
    """Parse the `name = literal` lines of a config file into a dict, checked against the fields."""
    try:
        with open(path, encoding="utf-8-sig") as file:  # with or without a byte order mark
            statements = ast.parse(file.read()).body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:  # not Python, or not UTF-8
        where = f"{path}:{getattr(error, 'lineno', None) or 1}"
        raise UserError(f"{where}: {getattr(error, 'msg', error)}; write `key = value` lines in UTF-8") from None
    values, lines = {}, {}
    for statement in statements:
        where = f"{path}:{statement.lineno}"
        match statement:
            case ast.Expr(value=ast.Constant()):  # a docstring
                continue
            case ast.Assign(targets=[ast.Name(id=name)]):
                field = fields.get(name) or _unknown(name, fields, where)
            case _:
                raise UserError(f"{where}: a config file holds only lines of the form `key = value`")
        if name in values:
            raise UserError(f"{where}: {name} is set twice (first on line {lines[name]})")
        try:
            value = ast.literal_eval(statement.value)
        except (ValueError, TypeError, MemoryError, RecursionError):
            raise UserError(f"{where}: {name} must be a plain number, string or True/False") from None
        values[name], lines[name] = _checked(field, value, where), statement.lineno
    return values


def _checked(field, value, where):
    """Return `value` as the field's type, or raise UserError. An int is accepted for a float; nothing else mixes."""
    kind, choices, within = field.type, field.metadata["choices"], field.metadata["within"]
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**63 else math.inf
    if type(value) is not kind:
        raise UserError(f"{where}: {field.name} must be {kind.__name__}, got {value!r} ({type(value).__name__})")
    if choices and value not in choices:
        raise UserError(f"{where}: {field.name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{where}: {field.name} must be a finite number, got {value}")
    if kind is int and abs(value) >= 2**63:
        raise UserError(f"{where}: {field.name} must fit in 64 bits, got {value}")
    if within:
        low, high = (float(end) for end in within[1:-1].split(","))
        inside = low <= value <= high and (value > low or within[0] == "[") and (value < high or within[-1] == "]")
        if not inside:
            raise UserError(f"{where}: {field.name} must lie in {within}, got {value!r}")
    if kind is str and not value.isprintable():
        surrogates = any("\ud800" <= character <= "\udfff" for character in value)  # bytes that are not UTF-8
        what = "is not UTF-8; write it in UTF-8" if surrogates else "contains a control character; use a plain name"
        if surrogates or not field.metadata["free_text"]:
            raise UserError(f"{printable(where)}: {field.name} {what}")
    if kind is str and not field.metadata["free_text"]:  # a shell expands ~ only at the beginning of a word
        value = re.sub(r"(^|[,=])~(?=/|$|,)", lambda match: match[1] + os.path.expanduser("~"), value)
        value = plain_path(value) if field.name.endswith("_dir") else value  # a trailing slash is the same run
    return value


# ---- wrong input, and --help ----


def _literal(text):
    """The number or boolean that a flag's text spells, or else the text itself, for the type check to report."""
    if text.strip("+-").lower() in ("nan", "inf", "infinity"):
        return float(text)
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def _unknown(name, fields, where):
    """Raise UserError for an unknown key, suggesting the nearest known one."""
    near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "--help lists the keys"
    raise UserError(f"{where}: unknown key {name!r}; {hint}")


def _print_help(cls, fields):
    module = sys.modules["__main__"].__spec__  # set when started as `python -m data.prepare`
    script = f"-m {module.name}" if module else sys.argv[0]
    print(f"{cls.__doc__.strip()}\n\nusage: python {script} [config file] [--key=value ...]\n")
    for name, field in fields.items():
        choices, within = field.metadata["choices"], field.metadata["within"]
        allowed = f"; one of {', '.join(map(repr, choices))}" if choices else f"; in {within}" if within else ""
        print(f"  --{name} ({field.type.__name__}, default {field.default!r})")
        print(f"      {field.metadata['help']}{allowed}")
