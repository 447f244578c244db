"""Downloads of checkpoints, from a server on this machine."""

import io
import os
import urllib.request
from pathlib import Path

import pytest
import torch

from tests.equality import same
from training import checkpoint, downloads

WEIGHTS = {"fc.weight": torch.arange(12.0).view(3, 4), "fc.bias": torch.zeros(3)}


def saved(kind):
    """A checkpoint of WEIGHTS as bytes: 'zip', 'legacy' or 'safetensors'."""
    if kind == "safetensors":
        return pytest.importorskip("safetensors.torch").save(WEIGHTS)
    file = io.BytesIO()
    torch.save(WEIGHTS, file, _use_new_zipfile_serialization=kind == "zip")
    return file.getvalue()


def kept():
    """The files that are left of all downloads."""
    folder = Path(torch.hub.get_dir(), "checkpoints")
    return sorted(folder.iterdir()) if folder.is_dir() else []


def fetch(url):
    """Download without a check."""
    return downloads.fetch(url, lambda path, name: None)


def refusal(url, function=checkpoint.read):
    """The reason in the sentence with which a download is refused."""
    with pytest.raises(OSError) as caught:
        function(url)
    start, end = f"Cannot download {url} (", "): download it by hand and pass its path."
    text = str(caught.value)
    assert text.startswith(start) and text.endswith(end) and "\n" not in text
    return text.removeprefix(start).removesuffix(end)


def test_fetch_downloads_once_and_keeps_equal_names_apart(tmp_path, server):
    address, content, asked = server
    content |= {"/a/checkpoint.pth": b"one", "/b/checkpoint.pth": b"two"}
    one, two = (fetch(f"{address}/{name}/checkpoint.pth") for name in "ab")
    assert fetch(f"{address}/a/checkpoint.pth") == one and asked == list(content)
    assert Path(one).read_bytes() == b"one" and Path(two).read_bytes() == b"two"
    assert kept() == sorted([Path(one), Path(two)])
    assert one.endswith("-checkpoint.pth")
    assert fetch(tmp_path / "x.pth") == tmp_path / "x.pth" and fetch("x.pth") == "x.pth"


def test_failed_downloads_are_one_sentence_and_leave_nothing(server):
    address, content, _ = server
    content["/cut/a.pth"] = b"12345678"
    assert refusal(f"{address}/none.pth", fetch) == "HTTP Error 404: Not Found"
    assert refusal(f"{address}/cut/a.pth", fetch) == "4 of 8 bytes came"
    assert "refused" in refusal("http://127.0.0.1:9/a.pth", fetch)
    assert os.listdir(Path(torch.hub.get_dir(), "checkpoints")) == []


# -------------------------------------------------------------------------------- what came


@pytest.mark.parametrize("length", ["", "/open"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_whole_checkpoint_is_kept(server, kind, length):
    address, content, asked = server
    path = f"{length}/model.{'safetensors' if kind == 'safetensors' else 'pth'}"
    content[path] = saved(kind)
    for _ in range(2):
        read = checkpoint.read(address + path)
        weights = checkpoint.weights_in(read, path)
        assert all(torch.equal(weights[key], value) for key, value in WEIGHTS.items()) and len(weights) == 2
    assert asked == [path] and [file.read_bytes() for file in kept()] == [content[path]]


@pytest.mark.parametrize("path, body, reason", [
    ("/page.pth", b"<!DOCTYPE html><title>Sign in</title>", "it is no PyTorch file"),
    ("/page.safetensors", b"<!DOCTYPE html><title>Sign in</title>", "it is damaged or no safetensors file: "),
    ("/empty.pth", b"", "it is no PyTorch file"),
    ("/pickle.pth", b"\x80\x02K\x01.", "it is no PyTorch file"),
    ("/open/cut/a.pth", "zip", "its end is missing"),
    ("/open/cut/b.pth", "legacy", "Cannot read the checkpoint "),
    ("/open/cut/a.safetensors", "safetensors", "it is damaged or no safetensors file: "),
])  # fmt: skip
def test_what_is_damaged_or_no_checkpoint_is_not_kept(server, path, body, reason):
    address, content, asked = server
    content[path] = saved(body) if isinstance(body, str) else body
    for _ in range(2):  # it is asked for again, because it was not kept
        assert refusal(address + path).startswith(reason)
    assert asked == [path, path] and kept() == []
    if isinstance(body, str):  # once it is mended, it is taken
        content[path.replace("/cut", "/whole")] = saved(body)
        assert checkpoint.read(address + path.replace("/cut", "/whole"))


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_checkpoint_cut_anywhere_is_not_kept(server, kind):
    address, content, _ = server
    whole = saved(kind)
    for i, size in enumerate((1, 9, 30, len(whole) // 3, len(whole) - 20, len(whole) - 1)):
        path = f"/open/{i}.{'safetensors' if kind == 'safetensors' else 'pth'}"
        content[path] = whole[:size]
        assert refusal(address + path)
    assert kept() == []


def test_a_flipped_bit_is_not_kept(server):
    address, content, _ = server
    whole = saved("zip")
    place = whole.index(WEIGHTS["fc.weight"].numpy().tobytes())
    content["/a.pth"] = whole[: place + 5] + bytes([whole[place + 5] ^ 1]) + whole[place + 6 :]
    assert refusal(f"{address}/a.pth").startswith("it is damaged: ")
    assert kept() == []


@pytest.mark.parametrize("length", ["", "/open"])
def test_a_download_ends_at_the_largest_size(server, monkeypatch, length):
    address, content, _ = server
    whole = saved("zip")
    content[f"{length}/a.pth"] = whole
    monkeypatch.setattr(downloads, "MAX_BYTES", len(whole) - 1)
    assert refusal(f"{address}{length}/a.pth") == f"it is larger than {len(whole) - 1:,} bytes"
    assert kept() == []
    monkeypatch.setattr(downloads, "MAX_BYTES", len(whole))
    assert same(checkpoint.read(f"{address}{length}/a.pth"), WEIGHTS)


# -------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize("url", [
    "file:///a.pth", "ftp://127.0.0.1/a.pth", "s3://bucket/a.pth", "http://example.invalid/a.pth",
    "http://127.0.0.1.example.invalid/a.pth", "http://localhost@example.invalid/a.pth", "HTTP://example.invalid/a.pth",
])  # fmt: skip
def test_other_addresses_are_refused(url, server):
    assert refusal(url) == f"{url} is no https address; http is for this machine alone"
    assert kept() == []


@pytest.mark.parametrize("url", ["https://[/a.pth", "https://example.invalid:x/a.pth", "https:///a.pth"])
def test_broken_addresses_are_one_sentence(url, server):
    assert refusal(url) and kept() == []


@pytest.mark.parametrize("target, words", [
    ("http://example.invalid/a.pth", "http is for this machine alone"),
    ("ftp://127.0.0.1/a.pth", "http is for this machine alone"),
    ("file:///etc/passwd", "not allowed"),  # by Python itself
])  # fmt: skip
def test_a_redirect_to_another_address_is_refused(server, target, words):
    address, content, asked = server
    content |= {"/there.pth": saved("zip"), "/twice.pth": "/once.pth", "/once.pth": f"{address}/there.pth"}
    assert same(checkpoint.read(f"{address}/twice.pth"), WEIGHTS)
    assert asked == ["/twice.pth", "/once.pth", "/there.pth"]
    content["/away.pth"] = target
    assert words in refusal(f"{address}/away.pth")
    assert len(kept()) == 1


def test_a_redirect_from_https_to_http_is_refused_even_to_this_machine():
    request = urllib.request.Request("https://example.invalid/a.pth")
    follow = downloads._Redirects().redirect_request
    assert follow(request, None, 302, "Found", {}, "https://example.invalid/b.pth").full_url.endswith("/b.pth")
    with pytest.raises(
        ValueError, match="^http://127.0.0.1/a.pth is no https address; http is for this machine alone$"
    ):
        follow(request, None, 302, "Found", {}, "http://127.0.0.1/a.pth")
