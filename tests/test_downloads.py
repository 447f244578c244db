"""Downloads of checkpoints, from a server on this machine."""

import os
from pathlib import Path

import pytest
import torch

from training import downloads


def test_fetch_downloads_once_and_keeps_equal_names_apart(tmp_path, server):
    address, content, asked = server
    content |= {"/a/checkpoint.pth": b"one", "/b/checkpoint.pth": b"two"}
    one, two = (downloads.fetch(f"{address}/{name}/checkpoint.pth") for name in "ab")
    assert downloads.fetch(f"{address}/a/checkpoint.pth") == one and asked == list(content)
    assert Path(one).read_bytes() == b"one" and Path(two).read_bytes() == b"two"
    folder = Path(torch.hub.get_dir(), "checkpoints")
    assert sorted(folder.iterdir()) == sorted([Path(one), Path(two)])
    assert one.endswith("-checkpoint.pth")
    assert downloads.fetch(tmp_path / "x.pth") == tmp_path / "x.pth" and downloads.fetch("x.pth") == "x.pth"


def test_failed_downloads_are_one_sentence_and_leave_nothing(tmp_path, server):
    address, content, _ = server
    content["/cut/a.pth"] = b"12345678"
    for url, reason in (
        (f"{address}/none.pth", "HTTP Error 404: Not Found"),
        (f"{address}/cut/a.pth", "4 of 8 bytes came"),
        ("http://127.0.0.1:9/a.pth", ".*refused.*"),
    ):
        with pytest.raises(
            OSError, match=rf"^Cannot download {url} \({reason}\): download it by hand and pass its path"
        ):
            downloads.fetch(url)
    assert os.listdir(Path(torch.hub.get_dir(), "checkpoints")) == []
