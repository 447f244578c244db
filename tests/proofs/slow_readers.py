"""A second, slow and simple implementation of the readers of split files, lists and CSV files, which fuzz.py compares.

Each reader takes the bytes of a file and returns its content, or None if the file must be refused.
"""

import os
import re

BLANKS = " \t\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
DIGITS = "0123456789"


def text_of(content):
    """The text of a file with \\n as line ending; None if it is not UTF-8 or contains a zero byte."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return None if "\0" in text else text


def stays_inside(entry):
    """Whether a relative path stays in its folder: it is not absolute, and no part is `..`."""
    return entry[:1] != "/" and all(part != ".." for part in entry.split("/"))


def plain(entry):
    """A relative path without parts that lead nowhere: `./a//b` is `a/b`."""
    return "/".join(part for part in entry.split("/") if part not in ("", ".")) or "."


def _is_number(text):
    return text != "" and set(text) <= set(DIGITS)


def split(content, paths):
    """Indices into `paths` of the images in a split file."""
    text, found = text_of(content), []
    for line in text.split("\n") if text is not None else ():
        line = line.strip(BLANKS + "\n\r")
        columns = line.split(",")
        if len(columns) > 2 and all(_is_number(column.strip(BLANKS)) for column in columns[-2:]):
            line = ",".join(columns[:-2]).strip(BLANKS)
        elif not line:
            continue
        exact = [i for i, path in enumerate(paths) if path == plain(line)]
        named = exact or [i for i, path in enumerate(paths) if path.split("/")[-1] == plain(line)]
        if not stays_inside(line) or len(named) != 1 or named[0] in found:
            return None
        found += named
    return found or None


def path_and_target(line):
    """(path, target) of a line of a list; (the whole line, -1) if the line does not end in a target."""
    head = line.rstrip(DIGITS)
    digits = line[len(head) :]
    minus = head.endswith("-")
    rest = head[:-1] if minus else head
    path = rest.rstrip(BLANKS)
    path = path[:-1].rstrip(BLANKS) or path if path.endswith(",") else path
    if not 1 <= len(digits) <= 7 or path == rest or not path:
        return line, -1
    return path, -1 if minus and int(digits) else int(digits)


def image_list(content, root):
    """(paths, targets, classes) of a labelled list."""
    text, rows = text_of(content), []
    for line in text.split("\n") if text is not None else ():
        line = line.strip(BLANKS)
        if line:
            rows.append(path_and_target(line))
            if rows[-1][1] < 0 or not stays_inside(rows[-1][0]):
                return None
    if not any(os.path.isfile(f"{root}/{path}") for path, _ in rows[:100]):
        return None
    targets = [target for _, target in rows]
    if max(targets) > 99_999:
        return None
    return [path for path, _ in rows], targets, tuple(str(i) for i in range(max(targets) + 1))


def cells(text):
    """Rows of cells of a CSV file, parsed character by character; None if the quotes do not match."""
    rows, row, cell, state = [], [], "", "start"
    for letter in text + ("" if text.endswith("\n") or not text else "\n"):
        if state == "quoted":
            if letter == '"':
                state = "quote"
            else:
                cell += letter
        elif letter == '"' and state == "quote":
            cell, state = cell + '"', "quoted"
        elif letter == '"' and state == "start":
            state = "quoted"
        elif letter in ",\n":
            row, cell, state = [*row, cell], "", "start"
            if letter == "\n":
                rows, row = [*rows, row], []
        elif state == "quote":
            return None
        elif not (letter == " " and state == "start"):
            cell, state = cell + letter, "plain"
    return None if state != "start" or row else rows


def natural(name):
    """A sort key that puts class2 before class10: the name split into (letters, number) pairs."""
    parts = re.findall("([^0-9]*)([0-9]*)", name.lower())
    return [(letters, int(digits) if digits else -1) for letters, digits in parts], name


PATH_WORDS = ["path", "file", "filename", "filepath", "image", "imagename", "imagepath", "imagefile", "img", "imgname",
              "imgpath", "name"]  # fmt: skip
LABEL_WORDS = ["label", "labels", "class", "classname", "category", "target"]


def is_header(row):
    """Whether a row of one or two cells names the columns."""
    words = [cell.lower().replace(" ", "").replace("_", "").replace("-", "") for cell in row]
    return words[0] in PATH_WORDS and (len(row) == 1 or len(row) == 2 and words[1] in LABEL_WORDS)


def image_csv(content, root):
    """(paths, targets, classes) of a CSV file of images."""
    text = text_of(content)
    rows, found, header = None if text is None else cells(text), {}, False
    for row in rows or ():
        row = [cell.strip(BLANKS + "\n") for cell in row]
        if not any(row):
            continue
        if not found and is_header(row):
            header = True
            continue
        if len(row) > 2 or not row[0] or not stays_inside(row[0]) or plain(row[0]) in found:
            return None
        found[plain(row[0])] = row[1] if len(row) == 2 else ""
    exist = [os.path.isfile(f"{root}/{path}") for path in list(found)[:100]]
    if not any(found.values()) or not any(exist):
        return None
    if not exist[0] and not header and "." not in list(found)[0]:
        return None  # an unknown header
    labels = sorted({label for label in found.values() if label}, key=natural)
    return list(found), [labels.index(label) if label else -1 for label in found.values()], tuple(labels)
