"""Checkpoints from an address."""

import hashlib
import os
import shutil
import urllib.request
from http.client import HTTPException
from urllib.parse import urlsplit

import torch

from utils import atomic, print_main


def fetch(path_or_url):
    """The local path of a checkpoint. An http(s) URL is downloaded, once, into torch.hub's folder of checkpoints.

    Several processes may do so at the same time, because each renames a complete file of its own into place.
    Raises OSError naming the URL where the download fails or is incomplete.
    """
    url = str(path_or_url)
    if not url.startswith(("http://", "https://")):
        return path_or_url
    # With a hash of the URL, because most files are called checkpoint.pth.
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{os.path.basename(urlsplit(url).path)}"
    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    if os.path.isfile(path):
        print_main(f"{url} is already in {path}.")
        return path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    print_main(f"Downloading {url} to {path}.")
    try:
        # Not torch.hub.download_url_to_file, which takes a connection that breaks off for the end of the file.
        request = urllib.request.Request(url, headers={"User-Agent": "torch.hub"})
        with urllib.request.urlopen(request, timeout=60) as answer, atomic(path) as file:
            shutil.copyfileobj(answer, file)
            length = int(answer.headers.get("Content-Length", file.tell()))
            if file.tell() != length:
                raise ConnectionError(f"{file.tell()} of {length} bytes came")
    except (OSError, ValueError, HTTPException) as error:
        raise OSError(f"Cannot download {url} ({error}): download it by hand and pass its path.") from error
    return path
