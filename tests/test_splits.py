"""Split files: made from a train folder, the same everywhere, and fetched whole or not at all."""

import hashlib
import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from data_splits import fetch_split
from data_splits.make_split import make_split, shard_lines
from images.readers import image_folder, read_split
from tests.trees import ROOT, forked

SIZES = {"class10": 7, "class2": 40, "zebra": 13, "été": 20}


def run(tool, *words):
    """A tool with the words a user would give it."""
    (done,) = forked(f"data_splits.{tool}", *words)
    return done


def assert_refused(done, *parts):
    """The run ended with one sentence that says what is wrong."""
    assert done.returncode == 1 and done.stdout == "", done
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr
    assert all(str(part) in done.stderr for part in parts), done.stderr


def plant(root, sizes=SIZES, backwards=False, name="{c}_{i}.JPEG"):
    """A train folder of empty files; the order they are created in is free."""
    files = [root / c / name.format(c=c, i=i) for c, size in sizes.items() for i in range(size)]
    for file in reversed(files) if backwards else files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return root


def content(folder):
    return [(folder / name).read_bytes() for name in ("all.txt", "labelled.txt")]


def names(path):
    return [line.rsplit(",", 2)[0] for line in path.read_text(encoding="utf-8").splitlines()]


def counts(path):
    return Counter(name.rsplit("_", 1)[0] for name in names(path))


# -------------------------------------------------------------------------------- make_split


def test_the_same_names_give_the_same_lists(tmp_path):
    make_split(plant(tmp_path / "a"), tmp_path / "out", fraction=0.25)
    other = plant(tmp_path / "b", dict(reversed(SIZES.items())), backwards=True)
    # In a process of its own, because Python reads these settings when it starts.
    command = [sys.executable, "-m", "data_splits.make_split", other, tmp_path / "again", "--fraction", "0.25"]
    env = {**os.environ, "PYTHONHASHSEED": "77", "LC_ALL": "C"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "out") == content(tmp_path / "again")
    for line, name, count in zip(done.stdout.splitlines(), ("all.txt", "labelled.txt"), (80, 20)):
        digest = hashlib.sha256((tmp_path / "again" / name).read_bytes()).hexdigest()
        assert name in line and f" {count} images of 4 classes" in line and digest in line
    assert "7 to 40 per class" in done.stdout
    make_split(tmp_path / "b", tmp_path / "one", fraction=0.25, seed=1)
    assert content(tmp_path / "one")[1] != content(tmp_path / "out")[1]
    assert sorted(names(tmp_path / "one/all.txt")) == sorted(names(tmp_path / "out/all.txt"))


def test_the_lists_do_not_change_from_version_to_version(tmp_path):
    make_split(plant(tmp_path / "train", {"a": 3, "b": 2}), tmp_path / "out", fraction=0.4, shards=2)
    # random.Random(0): 0.844 a_0, 0.758 a_1, 0.421 a_2, 0.259 b_0, 0.511 b_1
    every = ["b_0.JPEG,0,0\n", "a_2.JPEG,0,1\n", "b_1.JPEG,1,0\n", "a_1.JPEG,1,1\n", "a_0.JPEG,1,2\n"]
    assert content(tmp_path / "out") == ["".join(every).encode(), "".join(every[:2]).encode()]


@pytest.mark.parametrize("shards", [1, 7, 80, 1020])
def test_each_image_is_in_one_shard_and_shards_are_even(tmp_path, shards):
    make_split(plant(tmp_path / "train"), tmp_path / "out", fraction=1, shards=shards)
    lines = (tmp_path / "out/all.txt").read_text(encoding="utf-8").splitlines()
    rows = [(name, int(shard), int(place)) for name, shard, place in (line.rsplit(",", 2) for line in lines)]
    assert sorted(row[0] for row in rows) == sorted(path.name for path in (tmp_path / "train").rglob("*.JPEG"))
    sizes = Counter(shard for _, shard, _ in rows)
    assert max(sizes.values()) - min(sizes[s] for s in range(shards)) <= 1 and max(sizes) < shards
    assert [row[1:] for row in rows] == [(s, p) for s in range(shards) for p in range(sizes[s])]
    assert content(tmp_path / "out")[0] == content(tmp_path / "out")[1]


def test_shards_end_where_the_published_ones_do():
    lines = shard_lines(["x"] * 1_281_167, 1020)
    assert lines[128_115].startswith("x,101,") and lines[128_116] == "x,102,0\n"
    assert lines[64_057].startswith("x,50,") and lines[64_058] == "x,51,0\n"


@pytest.mark.parametrize("drawn, expected", [
    ({"per_class": 7}, dict.fromkeys(SIZES, 7)),
    ({"per_class": 1}, dict.fromkeys(SIZES, 1)),
    ({"fraction": 0.1, "balanced": True}, {"class10": 1, "class2": 4, "zebra": 1, "été": 2}),
    ({"fraction": 0.01, "balanced": True}, dict.fromkeys(SIZES, 1)),
    ({"fraction": 1.0, "balanced": True}, SIZES),
])  # fmt: skip
def test_classes_get_their_number(tmp_path, drawn, expected):
    make_split(plant(tmp_path / "train"), tmp_path / "out", **drawn)
    assert counts(tmp_path / "out/labelled.txt") == expected
    every, labelled = (path.splitlines() for path in content(tmp_path / "out"))
    assert [line for line in every if line in set(labelled)] == labelled


@pytest.mark.parametrize("fraction, count", [(0.1, 8), (0.33, 26), (0.5, 40), (1, 80)])
def test_a_fraction_is_the_first_lines(tmp_path, fraction, count):
    make_split(plant(tmp_path / "train"), tmp_path / "out", fraction=fraction)
    every, labelled = (path.splitlines() for path in content(tmp_path / "out"))
    assert labelled == every[:count]


@pytest.mark.parametrize("name", ["{c}_{i}.JPEG", "{i}.png", "x/{c},{i},0.png"])
def test_read_split_reads_what_was_drawn(tmp_path, name):
    sizes = {"class10": 3, "class2": 5, "été": 1}
    make_split(plant(tmp_path / "train", sizes, name=name), tmp_path / "out", per_class=1)
    samples = image_folder(tmp_path / "train")
    found = read_split(tmp_path / "out/labelled.txt", samples)
    assert sorted(samples.targets[found]) == [0, 1, 2]
    listed = names(tmp_path / "out/labelled.txt")
    assert [samples.source.path(i) for i in found] == [
        path for entry in listed for path in map(samples.source.path, range(9)) if f"/{path}".endswith(f"/{entry}")
    ]
    assert sorted(read_split(tmp_path / "out/all.txt", samples)) == list(range(9))


def test_only_shared_names_are_paths(tmp_path):
    plant(tmp_path / "train", {"a": 2, "b": 1}, name="{i}.png")
    make_split(tmp_path / "train", tmp_path / "out", fraction=1)
    assert sorted(names(tmp_path / "out/all.txt")) == ["1.png", "a/0.png", "b/0.png"]


@pytest.mark.parametrize("drawn, parts", [
    ({"per_class": 8}, ["'class10'", "7 images", "--per-class asks for 8"]),
    ({"per_class": 0}, ["--per-class 0"]), ({"per_class": 1, "balanced": True}, ["--balanced"]),
    ({"fraction": 0.0}, ["--fraction 0.0"]), ({"fraction": 1.1}, ["--fraction 1.1"]),
    ({"fraction": float("nan")}, ["--fraction nan"]), ({"fraction": 0.001}, ["--fraction 0.001 of 80 images is none"]),
    ({"fraction": 0.1, "seed": -1}, ["--seed -1"]), ({"fraction": 0.1, "shards": 0}, ["--shards 0"]),
    ({"fraction": 0.1, "shards": 10**12}, ["--shards 1000000000000", "1000000"]),
])  # fmt: skip
def test_unfit_flags_are_named_and_nothing_is_written(tmp_path, drawn, parts):
    plant(tmp_path / "train")
    with pytest.raises(ValueError) as caught:
        make_split(tmp_path / "train", tmp_path / "out", **drawn)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [b"new\nline.png", b" blank.png", b"\xff.png", "\ufeffmark.png".encode()])
def test_names_no_line_can_hold(tmp_path, name):
    plant(tmp_path / "train", {"a": 2})
    with open(os.path.join(os.fsencode(tmp_path / "train/a"), name), "wb"):
        pass
    with pytest.raises(ValueError, match="No list can hold 'a/.*rename it"):
        make_split(tmp_path / "train", tmp_path / "out", fraction=1)


def test_another_list_is_not_overwritten(tmp_path):
    plant(tmp_path / "train")
    first = make_split(tmp_path / "train", tmp_path / "out", fraction=0.5)
    kept = content(tmp_path / "out")
    assert make_split(tmp_path / "train", tmp_path / "out", fraction=0.5) == first
    with pytest.raises(FileExistsError, match="labelled.txt holds another list"):
        make_split(tmp_path / "train", tmp_path / "out", fraction=0.2)
    assert content(tmp_path / "out") == kept and len(list((tmp_path / "out").iterdir())) == 2


def test_a_list_that_is_a_fifo_is_refused_and_does_not_block(tmp_path):
    plant(tmp_path / "train")
    (tmp_path / "out").mkdir(), os.mkfifo(tmp_path / "out/all.txt")
    with pytest.raises(OSError, match="Cannot write .*all.txt .it is not a regular file"):
        make_split(tmp_path / "train", tmp_path / "out", fraction=0.5)


def test_unfit_folders_are_named(tmp_path):
    (tmp_path / "file").touch()
    plant(tmp_path / "train")
    assert_refused(run("make_split", tmp_path / "none", tmp_path / "out", "--fraction", "0.1"), tmp_path / "none")
    with pytest.raises(OSError, match="Cannot write .*file/out/all.txt .*OUT"):
        make_split(tmp_path / "train", tmp_path / "file/out", fraction=0.1)
    with pytest.raises(ValueError, match="would be a class"):
        make_split(tmp_path / "train", tmp_path / "train/out", fraction=0.1)


# -------------------------------------------------------------------------------- fetch_split

LINES = [f"n01440764_{i}.JPEG,{i // 4},{i % 4}\n".encode() for i in range(10)]
NAMES = b"".join(b"n01440764_%d.JPEG\n" % i for i in range(10))
COMPLETE, HEAD = b"".join(LINES), b"".join(LINES[:5])


@pytest.fixture
def served(monkeypatch):
    """A server of `bodies`, path -> body or (body, declared length); its address, and the paths that were requested."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path not in bodies:
                return self.send_error(404)
            body = bodies[self.path]
            body, length = body if isinstance(body, tuple) else (body, len(body))
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)
            if not body:
                over.wait(20)

        def log_message(self, *_):
            pass

    bodies, asked, over = {}, [], threading.Event()
    monkeypatch.setenv("no_proxy", "*")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield bodies, f"http://127.0.0.1:{server.server_port}/lists", asked
    over.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def lists(monkeypatch):
    """Small lists instead of the published ones."""
    table = {
        "fixmatch10": fetch_split.Published(10, hashlib.sha256(COMPLETE).hexdigest(), "http://nowhere", "ten.txt"),
        "fixmatch5": fetch_split.Published(5, hashlib.sha256(HEAD).hexdigest(), head_of="fixmatch10"),
        "simclr10": fetch_split.Published(10, None, "http://nowhere", "10percent.txt"),
    }
    monkeypatch.setattr(fetch_split, "LISTS", table)


def test_lists_are_fetched_once_and_cut(served, lists, tmp_path):
    bodies, url, asked = served
    bodies.update({"/lists/ten.txt": COMPLETE, "/lists/10percent.txt": NAMES})
    assert fetch_split.fetch("fixmatch5", tmp_path / "a/b", url) == tmp_path / "a/b/fixmatch5.txt"
    assert (tmp_path / "a/b/fixmatch5.txt").read_bytes() == HEAD
    assert fetch_split.fetch("fixmatch10", tmp_path / "a/b", url + "/").read_bytes() == COMPLETE
    assert fetch_split.fetch("simclr10", tmp_path / "a/b", url).read_bytes() == NAMES
    assert fetch_split.fetch("simclr10", tmp_path / "a/b", url).read_bytes() == NAMES
    assert asked == ["/lists/ten.txt", "/lists/10percent.txt"]
    assert len(list((tmp_path / "a/b").iterdir())) == 3


@pytest.mark.parametrize("name, body, reason", [
    ("fixmatch10", COMPLETE[:-1], "its sha256 is"), ("fixmatch5", HEAD, "its sha256 is"),
    ("fixmatch10", (COMPLETE[:99], len(COMPLETE)), "IncompleteRead"), ("simclr10", (NAMES[:99], 400), "IncompleteRead"),
    ("fixmatch10", None, "404"), ("fixmatch10", (b"", 5), "timed out"),
    ("simclr10", NAMES[:-18], "9 lines, not 10"), ("simclr10", NAMES[:-3], "'n01440764_9.JP'"),
    ("simclr10", b"<html>\n" + NAMES, "'<html>'"), ("simclr10", NAMES[17:] + NAMES[-17:], "twice"),
    ("simclr10", "é".encode() + NAMES, "is not an image name"),
])  # fmt: skip
def test_what_is_not_the_list_is_refused_and_not_kept(served, lists, tmp_path, monkeypatch, name, body, reason):
    bodies, url, _ = served
    monkeypatch.setattr(fetch_split, "TIMEOUT", 1)
    file = "10percent.txt" if name == "simclr10" else "ten.txt"
    if body is not None:
        bodies[f"/lists/{file}"] = body
    with pytest.raises((OSError, ValueError)) as caught:
        fetch_split.fetch(name, tmp_path, url)
    by_hand = tmp_path / f"{'fixmatch10' if name == 'fixmatch5' else name}.txt"
    assert all(part in str(caught.value) for part in (f"{url}/{file}", reason, f"at {by_hand}"))
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_checked(served, lists, tmp_path):
    _, url, asked = served
    (tmp_path / "fixmatch10.txt").write_bytes(COMPLETE)
    assert fetch_split.fetch("fixmatch5", tmp_path, url).read_bytes() == HEAD
    (tmp_path / "fixmatch10.txt").write_bytes(COMPLETE + b"\n")
    (tmp_path / "simclr10.txt").write_bytes(NAMES * 2)
    for name in ("fixmatch10", "simclr10"):
        with pytest.raises(ValueError, match=f"{name}.txt is not the published list .*remove it"):
            fetch_split.fetch(name, tmp_path, url)
    assert asked == [] and (tmp_path / "fixmatch10.txt").read_bytes() == COMPLETE + b"\n"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_cannot_be_written_is_named(served, lists, tmp_path):
    bodies, url, _ = served
    bodies["/lists/ten.txt"] = COMPLETE
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Cannot write .*file/fixmatch10.txt .*OUT_FOLDER"):
        fetch_split.fetch("fixmatch10", tmp_path / "file", url)


def test_fetch_says_so_and_ends_with_status_1(served, tmp_path):
    bodies, url, _ = served
    bodies["/lists/1percent.txt"] = b"".join(b"n01440764_%d.JPEG\n" % i for i in range(12_811))
    done = run("fetch_split", "simclr1", tmp_path, "--url", url)
    assert done.returncode == 0 and "12811 lines" in done.stdout and "not known" in done.stdout, done
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening, so that connections are refused
        closed = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert_refused(run("fetch_split", "fixmatch5", tmp_path, "--url", closed), closed, tmp_path / "fixmatch10.txt")
    assert_refused(run("fetch_split", "simclr10", tmp_path, "--url", "no address"), "no address/10percent.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["simclr1.txt"]


def test_the_published_sums_are_those_of_the_readme():
    rows = (ROOT / "data_splits/README.md").read_text(encoding="utf-8")
    for wanted in fetch_split.LISTS.values():
        assert f"{wanted.lines:,}" in rows and (wanted.sha256 or "not known here") in rows and wanted.file in rows
