"""check_images.py: every image is read as training reads it, counted by kind, and the unreadable ones are named."""

import os

import numpy as np
import pytest
from PIL import Image

from script import check_images
from tests.trees import broken_images, draw, forked, special_files


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """70 good images of many kinds, and eight of every broken kind (its ninth, a folder, holds one more good one)."""
    root = tmp_path_factory.mktemp("images")
    for i in range(60):
        draw(root / "good" / f"{i}.jpg")
    for mode in ("L", "P", "1", "RGBA", "LA", "CMYK"):
        draw(root / "kinds" / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}", mode=mode)
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(root / "kinds" / "sixteen.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(root / "kinds" / "float.tif")
    draw(root / "kinds" / "x.png").rename(root / "kinds" / "png.JPEG")
    (root / "kinds" / "notes.txt").write_text("no image")
    draw(root / "kinds" / ".hidden.png")
    (root / "broken").mkdir()
    broken_images(root / "broken")
    draw(root / "broken" / "folder.JPEG" / "in it.png")
    return root


SUMMARY = """\
        62  RGB
         1  CMYK, converted to RGB
         1  palette, converted to RGB
         1  1-bit, converted to RGB
         1  8-bit grey, converted to RGB
         1  grey with alpha, alpha dropped
         1  RGB with alpha, alpha dropped
         1  16-bit or wider grey, reduced to 8 bits
         1  floating point, clamped to 0..255
         8  unreadable
        78  in total below ROOT"""


@pytest.mark.parametrize("workers", [1, 3])
def test_every_kind_is_counted_and_the_broken_ones_are_named(root, workers, tmp_path, capsys):
    status = check_images.main([str(root), "--workers", str(workers), "--output", str(tmp_path / "bad.txt")])
    assert status == 1
    printed = capsys.readouterr()
    lines = printed.out.replace(str(root), "ROOT").splitlines()
    assert sorted(lines[8:]) == sorted(SUMMARY.splitlines()) and lines[8] == SUMMARY.splitlines()[0]
    names = ["bomb.bmp", "cut.JPEG", "cut.png", "dangling.JPEG", "empty.JPEG", "half.webp", "loop.JPEG", "text.JPEG"]
    assert [line.split(": ")[0] for line in lines[:8]] == [f"Cannot read the image ROOT/broken/{n}" for n in names]
    assert (tmp_path / "bad.txt").read_text().splitlines() == [f"broken/{name}" for name in names]
    last = printed.err.splitlines()[-1]
    assert last.startswith("100%") and " 78/78 " in last and last.endswith(", unreadable=8]")


def test_good_images_end_with_status_0(root, tmp_path, capsys):
    assert check_images.main([str(root / "good"), "--output", str(tmp_path / "bad.txt")]) == 0
    assert capsys.readouterr().out.split()[:4] == ["60", "RGB", "0", "unreadable"]
    assert (tmp_path / "bad.txt").read_bytes() == b""


def test_a_name_that_is_not_utf8(tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "images").mkdir()
    try:
        (tmp_path / "images" / name).write_bytes(b"")
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system wants UTF-8")
    assert check_images.main([str(tmp_path / "images"), "--output", str(tmp_path / "bad.txt")]) == 1
    assert "caf\\xe9.png: it is empty" in capsys.readouterr().out
    assert (tmp_path / "bad.txt").read_bytes() == b"caf\xe9.png\n"


@pytest.mark.parametrize("words, message", [
    (["none"], "There is no folder .*none: ROOT must be"), (["empty"], "There is no image below .*empty"),
    (["good", "--workers", "0"], "--workers 0 must be at least 1"), (["good", "--output", "none/x"], "none/x"),
    (["good", "--output", "good/a.png"], "--output good/a.png is one of the images: name another file"),
    (["good", "--output", "link"], "--output link is one of the images"),
    (["other"], "no image below other but 1 .heic, whose format is not read here: ROOT must be"),
])  # fmt: skip
def test_wrong_words_are_one_sentence(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    draw(tmp_path / "good" / "a.png")
    (tmp_path / "link").symlink_to("good/a.png")
    (tmp_path / "other").mkdir(), (tmp_path / "other" / "1.heic").write_text("")
    with pytest.raises(SystemExit, match=f"^check_images.py: error: .*{message}[^\n]*$"):
        check_images.main(words)


def test_special_files_and_links_end_and_other_formats_are_read_or_counted(tmp_path, monkeypatch, capsys):
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    special = special_files(tmp_path / "images")
    for name in ("a.gif", "\x1b[2Jb.png"):
        draw(tmp_path / "images" / name)
    (tmp_path / "images" / "\x1b[31mc.png").write_text("")
    (tmp_path / "images" / "1.heic").write_text("")
    (tmp_path / "images" / "up").symlink_to("..", target_is_directory=True)
    assert check_images.main(["images", "--workers", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "Cannot read the image images/\\x1b[31mc.png: it is empty" in lines
    assert {line.split(": ")[0].split("/")[-1] for line in lines[:-5]} == {*special, "\\x1b[31mc.png"}
    assert [line.split() for line in lines[-5:]] == [
        "1 RGB".split(), "1 palette, converted to RGB".split(), "7 unreadable".split(),
        "9 in total below images".split(), "Left out 1 .heic, whose format is not read here.".split()]  # fmt: skip


def test_the_results_are_printed_before_a_file_cannot_be_written(tmp_path, capsys):
    draw(tmp_path / "good" / "a.png")
    with pytest.raises(SystemExit):
        check_images.main([str(tmp_path / "good"), "--output", str(tmp_path / "none" / "x")])
    assert "0  unreadable" in capsys.readouterr().out


def test_what_is_no_images_fault_ends_the_check(root, monkeypatch):
    def fails(_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(check_images, "read_rgb", fails)
    with pytest.raises(OSError, match="Too many open files"):
        check_images.check(root, ["good/0.jpg"])


def test_as_a_program(root):
    (done,) = forked("script.check_images", root / "broken", "--workers", "1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-2:] == ["         8  unreadable", f"         9  in total below {root / 'broken'}"]
