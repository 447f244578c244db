"""Text files that name images: split files, lists and CSV files, parsed into rows. Nothing here reads an image."""

import csv
import io
import os
import posixpath
import re
import reprlib
from pathlib import Path

from images.files import read_regular

LOOKED_AT = 100  # paths of a file, to find out whether they exist
_REPR = reprlib.Repr()
_REPR.maxstring = 200


def quoted(entry):
    """An entry in quotes for an error message, without its middle where it is long."""
    return _REPR.repr(entry)


def read_text(path, what, flag):
    """Return a file's text; the errors it raises call the file `what` and name the flag that led to it."""
    try:
        text = read_regular(path).decode("utf-8-sig")  # skips the byte order mark that Windows editors write
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise FileNotFoundError(f"There is no {what} {path} ({flag}).") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"The {what} {path} is not UTF-8 text ({error}).") from error
    except OSError as error:
        raise OSError(f"Cannot read the {what} {path} ({flag}): {error.strerror}.") from error
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"The {what} {path} is not a text file: line {line} contains a null byte.")
    return text


def _lines(path, what, flag):
    """Yield (number, stripped line) for every line of a file that is not blank."""
    # splitlines would also split at characters such as U+2028, which file names may contain.
    for number, line in enumerate(read_text(path, what, flag).split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def check_entry(entry, where, root):
    """Raise ValueError if an image's listed path is outside of the root folder or cannot be a path."""
    # Symbolic links inside the folder may lead anywhere: the user made them.
    if entry.startswith("/") or ".." in entry.split("/"):
        raise ValueError(f"{where} leaves the data folder: write names or paths relative to {root}.")
    if "\0" in entry or any("\ud800" <= letter <= "\udfff" for letter in entry):  # JSON can encode both
        raise ValueError(f"{where} is not a file name: it contains a null byte or an unpaired surrogate.")


def split_entries(path):
    """Yield (line number, image) for every line `image[,shard,index in shard]` of a split file.

    Raises FileNotFoundError, OSError or ValueError as `read_text` does.
    """
    for number, line in _lines(path, "split file", "--data-split-file"):
        image, *columns = line.rsplit(",", 2)
        # The published lists have two columns of numbers, which are not labels. Other commas belong to the name.
        has_columns = len(columns) == 2 and all(n.isascii() and n.isdigit() for n in map(str.strip, columns))
        yield number, image.strip() if has_columns else line


def _path_and_target(line):
    """Take a line `path target` or `path,target` apart; (line, -1) where it does not end in a target.

    A number of more than seven digits is taken for a part of the path.
    """
    # From its end, because a regular expression would try every blank of a long line as the end of the path.
    path = line.rstrip("0123456789")
    number = line[len(path) :]
    if path.endswith("-"):
        path, number = path[:-1], f"-{number}"
    blank_free = path.rstrip()
    entry = blank_free.removesuffix(",").rstrip() or blank_free  # a lone comma is a path
    found = entry not in ("", path) and 1 <= len(number.removeprefix("-")) <= 7
    return (entry, int(number)) if found else (line, -1)


def list_rows(path, root, flag, labelled):
    """Return the paths and the targets of a list's lines; a missing target is -1."""
    paths, targets = [], []
    for number, line in _lines(path, "list", flag):
        entry, target = _path_and_target(line)
        where = f"{path}, line {number}"
        if labelled and target < 0:
            raise ValueError(f"{where}: {quoted(line)} has no class: write `path,target`, target 0 or more.")
        check_entry(entry, f"{where}: {quoted(entry)}", root)
        paths.append(entry)
        targets.append(max(target, -1))
    if not paths:
        raise ValueError(f"The list {path} names no image ({flag}).")
    return paths, targets


# Words that a header may call the columns of a CSV file, in lower case and without blanks, `_` and `-`.
_PATH_WORDS = set("path file filename filepath image imagename imagepath imagefile img imgname imgpath name".split())
_LABEL_WORDS = set("label labels class classname category target".split())


def _is_header(cells):
    words = [re.sub("[ _-]", "", cell.lower()) for cell in cells]
    return words[0] in _PATH_WORDS and set(words[1:]) <= _LABEL_WORDS


def csv_rows(path, flag, what="CSV file"):
    """Return {image: label} of a CSV file's rows `image,label` or `image`, in its order; a missing label is ''."""
    rows, headed, root = {}, False, Path(path).parent
    reader = csv.reader(io.StringIO(read_text(path, what, flag)), skipinitialspace=True, strict=True)
    try:
        for cells in reader:
            entry, *label = (cell.strip() for cell in cells or [""])
            if not any([entry, *label]):
                continue
            if not rows and len(label) < 2 and _is_header([entry, *label]):
                headed = True
                continue
            where = f"{path}, line {reader.line_num}: {quoted(entry)}"
            if len(label) > 1 or not entry:
                raise ValueError(f"{where}: write `path,label`, with quotes around a value that contains a comma.")
            check_entry(entry, where, root)
            entry = posixpath.normpath(entry)  # ./a//b.jpg is a/b.jpg
            if entry in rows:
                raise ValueError(f"{where} was listed before: remove one of the two.")
            rows[entry] = label[0] if label else ""
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not CSV: {error}.") from error
    exists = [os.path.isfile(root / entry) for entry in list(rows)[:LOOKED_AT]]
    if not headed and any(exists) and not exists[0] and "." not in (first := next(iter(rows))):
        raise ValueError(
            f"{path}: the first row, {quoted(first)}, looks like a header: name the columns path,label or remove it."
        )
    return rows
