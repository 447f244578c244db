"""Checkpoints from an address."""

import hashlib
import os
import re
import urllib.request
from functools import partial
from http.client import HTTPException
from urllib.parse import urlsplit

import torch

from utils import atomic, print_main

MAX_BYTES = 20 * 2**30  # of a download; what sends more is no checkpoint
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to allowed addresses only, and none from https to http."""

    def redirect_request(self, request, file, code, message, headers, url):
        _check_address(url, secure=request.full_url.startswith("https:"))
        return super().redirect_request(request, file, code, message, headers, url)


def _check_address(url, secure=False):
    address = urlsplit(url)
    local = address.scheme == "http" and address.hostname in THIS_MACHINE and not secure
    if address.scheme != "https" and not local:
        raise ValueError(f"{url} is no https address; http is for this machine alone")


def fetch(path_or_url, check):
    """The local path of a checkpoint. A URL is downloaded, once, into torch.hub's folder of checkpoints.

    Several processes may do so at the same time, because each renames a complete file of its own into place.

    Args:
        path_or_url: a path, which is returned as it is, or an https URL; http is for servers on this machine.
        check: function (path, name) of the downloaded file and the name that it will have; raises OSError or
            ValueError where it is damaged, and then it is not kept.
    Raises OSError naming the URL where it is of another kind, or the download fails, is damaged or too large.
    """
    url = str(path_or_url)
    if not re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", url):
        return path_or_url
    try:
        _check_address(url)
        # With a hash of the URL, because most files are called checkpoint.pth.
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{os.path.basename(urlsplit(url).path)}"
        path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
        if os.path.isfile(path):
            print_main(f"{url} is already in {path}.")
            return path
        os.makedirs(os.path.dirname(path), exist_ok=True)
        print_main(f"Downloading {url} to {path}.")
        # Not torch.hub.download_url_to_file, which takes a connection that breaks off for the end of the file.
        request = urllib.request.Request(url, headers={"User-Agent": "torch.hub"})
        with urllib.request.build_opener(_Redirects).open(request, timeout=60) as answer, atomic(path) as file:
            _copy(answer, file)
            file.flush()
            check(file.name, name)
    except (OSError, ValueError, HTTPException) as error:
        raise OSError(f"Cannot download {url} ({error}): download it by hand and pass its path.") from error
    return path


def _copy(answer, file):
    """Copy the body of an answer, all of it if its length was announced and not more than MAX_BYTES."""
    for block in iter(partial(answer.read, 2**20), b""):
        file.write(block)
        if file.tell() > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
    length = int(answer.headers.get("Content-Length", file.tell()))
    if file.tell() != length:
        raise ConnectionError(f"{file.tell()} of {length} bytes came")
