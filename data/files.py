"""Text files in the usual formats: plain text, JSON lines and parquet, gzipped or not, including chats.

TextFiles reads them one after another. An unreadable file gives one line with the file, the row and the remedy; a state
records the progress, so that reading resumes there once the file is fixed.
"""

import codecs
import contextlib
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import re
from collections import Counter

import numpy as np

from common.errors import UserError, read_json
from common.tokenizer import END_OF_TEXT, SETTINGS, encode, encode_continuation, load_tokenizer

PLAIN = (".txt", ".md", ".py")
COLUMNS = ("text", "content", "messages")  # the usual names of the column with the text
PIECE_BYTES = 4000  # longer plain text is cut at blank lines, so that one long file can be split too
REMEDY = "fix or remove the file, then run the same command to continue"
PUT_BACK = "put it back, or delete the domain's folder to start over"


def kind_of(path):
    """The suffix that says how to read a file: "b.JSONL.gz" -> ".jsonl"."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def list_files(path, kinds):
    """The files at a path, in order, of the first kind (a tuple of suffixes) that occurs there: {path relative to the
    folder: full path}, and the names of the other files. Links are followed, each folder once."""

    def cannot_list(error):
        if os.path.isdir(error.filename):
            raise UserError(f"{error.filename} cannot be read ({error.strerror}); fix that or move it away")

    path = os.path.expanduser(path)
    found = {os.path.basename(path): path} if os.path.isfile(path) else {}
    visited = set()
    for folder, subfolders, names in os.walk(path, onerror=cannot_list, followlinks=True):
        if os.path.realpath(folder) in visited:
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            full = os.path.join(folder, name)
            found[os.path.relpath(full, path).replace(os.sep, "/")] = full
    for kind in kinds:
        if chosen := {name: full for name, full in found.items() if kind_of(full) in kind}:
            for full in chosen.values():
                if not os.path.isfile(full):
                    raise UserError(f"{full} is not a file, or a broken link; fix or remove it")
            return chosen, sorted(found.keys() - chosen)
    return {}, sorted(found)


def not_read(others):
    """A line about files of other kinds, if there are any."""
    if others:
        yield f"files of other kinds, not read: {', '.join(others[:3])}{', ...' * (len(others) > 3)} ({len(others):,})"


# ---- one file ----


@contextlib.contextmanager
def opened(path, newline=None):
    """A file to read as text: UTF-8, or UTF-16 if a byte order mark says so."""
    with (gzip.open if path.lower().endswith(".gz") else open)(path, "rb") as file:
        is_utf16 = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        yield io.TextIOWrapper(file, "utf-16" if is_utf16 else "utf-8-sig", newline=newline)


def pieces(text, piece_bytes=PIECE_BYTES, ends=("\n\n", "\n")):
    """Cut a long text into pieces of about piece_bytes: at blank lines, and a paragraph twice as long at line ends."""
    piece = []
    size = 0
    for part in text.split(ends[0]):
        is_long = len(ends) > 1 and len(part.encode()) >= 2 * piece_bytes
        if not is_long:
            piece.append(part)
            size += len(part.encode()) + len(ends[0])
        if piece and (is_long or size >= piece_bytes):
            yield ends[0].join(piece)
            piece = []
            size = 0
        if is_long:
            yield from pieces(part, piece_bytes, ends[1:])
    if piece:
        yield ends[0].join(piece)


def json_rows(path):
    """(number, row) pairs of a file of JSON lines; a .json file may hold one list or object instead."""
    with opened(path, "\n") as file:  # strings may contain other characters that count as line ends elsewhere
        lines = file
        if kind_of(path) == ".json":
            text = file.read()
            try:
                found = json.loads(text)
                lines = [json.dumps(row) for row in (found if isinstance(found, list) else [found])]
            except ValueError:
                lines = text.split("\n")
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    reason = getattr(error, "msg", error)
                    raise UserError(f"{path}:{number}: expected a JSON object, found {reason}; {REMEDY}") from None
                yield number, row


def parquet_rows(path, columns, group):
    """(number, row) pairs of a parquet file. columns: the set of those that may have the text; without any of them, all
    are read."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path} needs the package datasets; pip install -r requirements-extra.txt") from None
    with ParquetFile(path) as file:
        names = file.schema_arrow.names
        wanted = names if columns.isdisjoint(names) else [name for name in names if name in {*columns, group}]
        batches = file.iter_batches(1024, columns=wanted)
        yield from enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), 1)


def plain_text(path):
    with opened(path) as file:
        text = file.read()
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(
            f"{path}:{line}: contains a NUL byte, so it is not text, or unmarked UTF-16; convert it or move it away"
        )
    return text


# ---- chats ----


class Rendered(str):
    """A text rendered from a chat: its special tokens are read as such, and none of them ends the document.

    answers: [(start, end)], the character ranges of the assistant's messages, each with its end marker; empty if they
    cannot be told apart in this form.
    """

    answers = ()


def render_chat(render, chat, **options):
    """The Rendered text of a chat. options: add_generation_prompt=True ends it where the next answer begins.

    An answer begins where a model would have to write it: after the earlier messages and the generation prompt. This
    needs a form in which the beginning of a chat looks the same with and without the rest.
    """
    text = Rendered(render(chat, **options))
    answers = []
    for number in [number for number, message in enumerate(chat) if message["role"] == "assistant"]:
        try:
            before = render(chat[:number], add_generation_prompt=True)
            whole = render(chat[: number + 1])
        except Exception:  # a template may refuse the beginning of a chat
            return text
        whole = whole[: max(len(before), len(whole.rstrip()))]
        if not (whole.startswith(before) and text.startswith(whole)):
            return text
        answers.append((len(before), len(whole)))
    text.answers = answers
    return text


def text_ids(encoding, text, special=False):
    """(the ids of a text, which of them are answers), two arrays of the same length.

    A chat's answers are encoded separately from the text before them, as when a model writes them. special: whether to
    read special tokens as such in any text, not only in chats.
    """
    special = special or isinstance(text, Rendered)
    cuts = [0, *itertools.chain(*getattr(text, "answers", ())), len(text)]  # every second piece is an answer
    ids = [encode(encoding, text[: cuts[1]], special)]
    for start, end in itertools.pairwise(cuts[1:]):
        ids.append(np.array(encode_continuation(encoding, text[start:end], special), np.uint32))
    return np.concatenate(ids), np.repeat(np.arange(len(ids)) % 2, [len(piece) for piece in ids]).astype(np.uint8)


def document_ids(encoding, text, special, spelled):
    """(the ids of a document, ending with the end-of-text token; how many of its bytes the tokenizer has no ids for;
    which ids belong to an answer or end one, uint8). special: see text_ids. spelled: spelled_bytes(encoding)."""
    ids, answers = text_ids(encoding, text, special)
    lost = max(0, len(text.encode()) - int(spelled[ids].sum()))
    if not len(ids) or ids[-1] != encoding.eot_token:
        ids = np.append(ids, encoding.eot_token)
        answers = np.append(answers, np.uint8(answers[-1:].any()))
    return ids, lost, answers


def losses(counts):
    """A line about text that the tokenizer has no ids for, if there is any. counts: those of some splits."""
    if lost := sum(count.get("lost", 0) for count in counts):
        share = lost / sum(count["bytes"] for count in counts)
        why = "the tokenizer lacks their characters or changes them"
        yield f"{lost:,} bytes of text ({share:.2%}) have no token: {why}; scores count only the rest"


def is_chat(value):
    """Whether a row's value is a list of {"role": string, "content": string}."""
    return isinstance(value, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in value
    )


def chatml(messages, add_generation_prompt=False):
    text = "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)
    return text + "<|im_start|>assistant\n" * add_generation_prompt


def questions(messages, add_generation_prompt=False, end=END_OF_TEXT):
    """The form of the built-in domains, for tokenizers without chat markers. end: the token that ends an answer."""
    forms = {"user": "Question: {}\n", "assistant": "Answer: {}\n" + end}
    parts = [forms.get(message["role"], "{}\n").replace("{}", message["content"].strip()) for message in messages]
    return "".join(parts) + "Answer:" * add_generation_prompt


def chat_renderer(folder):
    """(a function from a chat to text, a description of its form): the chat template in a tokenizer's folder, or else
    ChatML if the tokenizer has its markers, or else questions and answers."""
    encoding = load_tokenizer(folder) if folder else None
    if encoding and len(encode(encoding, "<|im_start|>", special=True)) == 1:
        other, form = chatml, "in the ChatML form"
    else:
        end = encoding.decode([encoding.eot_token]) if encoding else END_OF_TEXT
        other, form = functools.partial(questions, end=end), 'as "Question:" and "Answer:"'
    path = os.path.join(folder, SETTINGS)
    settings = read_json(path, "copy it again") if os.path.exists(path) else {}
    if not (settings.get("chat_template") or os.path.exists(os.path.join(folder, "chat_template.jinja"))):
        return other, f"{form}, because the tokenizer has no chat template"
    try:
        from transformers import PreTrainedTokenizerFast
    except ImportError:
        return other, f"{form}, because the tokenizer's chat template needs the package transformers"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return functools.partial(tokenizer.apply_chat_template, tokenize=False), "with the tokenizer's chat template"


# ---- all files ----


class TextFiles:
    """The documents in files, as a resumable stream of (the file's name, row, its texts, its group).

    files: {name: path}. column: which column has the text; empty means the first of COLUMNS that the first row has.
    group: a column that rows may have. markers: strings that end documents within a text. folder: the tokenizer's,
    whose chat template renders chats.

    state_dict() is {"files": {name: {"rows" read, their "hash", and its "bytes" if it was read completely}}, "broken":
    the file that could not be read further, and the numbers of "markers", "chats" and "unclear" chats}. After
    load_state_dict the stream resumes there: rows already read must be unchanged, and only the broken file may be gone.
    """

    def __init__(self, files, column="", group="", markers=(), folder=""):
        self.files, self.column, self.group, self.folder = files, column, group, folder
        self.cut = re.compile(rf"\n?(?:{'|'.join(map(re.escape, markers))})\n?") if markers else None
        self.decided = False
        self.render, self.way = None, ""  # set when the first chat comes
        self.met = Counter()  # markers and chats in the current row
        self.load_state_dict({"files": {}, "broken": None, "markers": 0, "chats": 0})

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state

    def columns(self):
        """(column, group) in the first file, "" for one that its rows do not have; None if there are no rows."""
        for _ in self.rows(next(iter(self.files.values()))):
            self.met.clear()
            return self.column, self.group

    def __iter__(self):
        known = self.state["files"]
        for name in known.keys() - self.files.keys() - {self.state["broken"]}:
            raise UserError(f"{name} has been read, and is now gone; {PUT_BACK}")
        for name, path in self.files.items():
            read = known.setdefault(name, {"rows": 0, "hash": ""})
            if "bytes" not in read:
                try:
                    yield from self.unread(name, read)
                except UserError:
                    self.state["broken"] = name
                    raise
                read["bytes"] = os.path.getsize(path)
            elif read["bytes"] != os.path.getsize(path):
                raise UserError(f"{path} has changed since it was read; {PUT_BACK}")

    def unread(self, name, read):
        """The rows of a file after those already read, which must be unchanged."""
        path, again, done = self.files[name], "", read["rows"]
        changed = UserError(f"{path}: its first {done} rows have changed since they were read; {PUT_BACK}")
        for number, texts, group in self.rows(path):
            met, self.met = self.met, Counter()
            is_new = number > done
            if is_new and again != read["hash"]:
                raise changed
            again = hashlib.sha256("\0".join([again, *texts]).encode()).hexdigest()
            if is_new:
                read |= {"rows": number, "hash": again}
                self.state |= {key: self.state.get(key, 0) + count for key, count in met.items()}
                yield name, number, texts, group
        if again != read["hash"]:
            raise changed

    def rows(self, path):
        """(row, its texts, its group) for each row of a file. UserError for anything wrong with it."""
        number, kind = 0, kind_of(path)
        try:
            if kind in PLAIN:
                text = plain_text(path)
                parts = [text] if kind == ".py" else itertools.chain.from_iterable(map(pieces, self.parts(text)))
                yield from ((number, [part], None) for number, part in enumerate(parts, 1))
                return
            columns = {self.column} if self.column else {*COLUMNS}
            for number, row in json_rows(path) if kind != ".parquet" else parquet_rows(path, columns, self.group):
                yield number, self.texts(row, f"{path}:{number}"), row.get(self.group)
        except UserError:
            raise
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text after row {number}; convert it or move it away") from None
        except Exception as error:  # from the disk, gzip or pyarrow, each with its own classes
            reason = (str(getattr(error, "strerror", None) or error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{path} cannot be read after row {number} ({reason}); {REMEDY}") from None

    def texts(self, row, where):
        """The documents in a row of JSON lines or parquet. The first row decides which columns are used."""
        if not isinstance(row, dict):
            raise UserError(
                f'{where}: expected a JSON object with a string under "{self.column or COLUMNS[0]}"; {REMEDY}'
            )
        if not self.decided:
            self.decided = True
            self.column = self.column or next((name for name in COLUMNS if name in row), COLUMNS[0])
            self.group = self.group if self.group in row else ""
        if self.column not in row:
            remedy = f"name the column with --column=NAME, or {REMEDY}"
            raise UserError(f'{where}: there is no "{self.column}" among {", ".join(map(repr, row))}; {remedy}')
        value = row[self.column]
        if value is None or value in ("", []):
            return []
        if is_chat(value):
            return [self.rendered(value, where)]
        try:
            value.encode()
        except (AttributeError, UnicodeEncodeError):
            kind = "half a surrogate pair" if isinstance(value, str) else type(value).__name__
            raise UserError(
                f'{where}: expected a string or a chat under "{self.column}", found {kind}; {REMEDY}'
            ) from None
        return self.parts(value)

    def parts(self, text):
        """The parts of a text, cut at the markers that end documents."""
        parts = self.cut.split(text) if self.cut else [text]
        self.met["markers"] += len(parts) - 1
        return [part for part in parts if part.strip()]

    def rendered(self, chat, where):
        if not self.render:
            self.render, self.way = chat_renderer(self.folder)
        self.met["chats"] += 1
        try:
            text = render_chat(self.render, chat)
        except Exception as error:  # from the template
            raise UserError(f"{where}: the chat template refuses this chat ({error}); {REMEDY}") from None
        self.met["unclear"] += not text.answers and any(message["role"] == "assistant" for message in chat)
        return text

    def origin(self):
        """How many rows of each file were turned into text."""
        return {"rows": {name: read["rows"] for name, read in self.state["files"].items()}}

    def remarks(self):
        """What the user should know about the text, a line each."""
        if markers := self.state["markers"]:
            yield f"{markers:,} end-of-document markers in the text were taken as ends of documents"
        if chats := self.state["chats"]:
            yield f"{chats:,} chats were written {self.way or chat_renderer(self.folder)[1]}"
        if unclear := self.state.get("unclear"):
            why = "the chat template renders the beginning of a chat differently without the rest"
            yield f"{unclear:,} chats have no answers that --loss_on=answers could count: {why}"
