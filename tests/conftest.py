"""Fixtures of several test files. The image trees are written once for all tests of a process; no test changes them."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from tests.trees import SMALL, make_tree


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """3 classes of 12 images to train with, 8 of them labelled, and 7 to evaluate."""
    return make_tree(tmp_path_factory.mktemp("tree"), train=12, val=7, labelled=8)


@pytest.fixture(scope="session")
def small_tree(tmp_path_factory):
    """3 classes of 4 images to train with, all of them labelled, and 2 to evaluate."""
    return make_tree(tmp_path_factory.mktemp("small_tree"), train=4, val=2)


@pytest.fixture(scope="session")
def words(small_tree):
    """The flags of a run of one step an epoch, supervised in epoch 0 and semi-supervised after it."""
    tiny = ["--batch-size", "4", "--mu", "0.5", "--steps-per-epoch", "1", "--warmup-epochs", "0"]
    data = ["--data-path", small_tree, "--data-split-file", small_tree / "labelled.txt", "--semi-start-epoch", "1"]
    # The smallest of timm's networks, because most of the time goes into checkpoints: they are saved a hundred times.
    return [*SMALL, *tiny, *data, "--model-ema-decay", "0.5", "--model", "lcnet_035"]


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch computes with one thread for the tests of a file, so that their sums do not depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """(address, {path: bytes or an address}, paths asked for): serves the bytes or a redirect to the address.

    Bytes whose path has /cut/ in it break off half-way; where it begins with /open/, their length is not announced.
    """
    content, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = content.get(self.path)
            if body is None:
                return self.send_error(404)
            self.send_response(302 if isinstance(body, str) else 200)
            if isinstance(body, str):
                self.send_header("Location", body)
                return self.end_headers()
            if not self.path.startswith("/open/"):
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if "/cut/" in self.path else body)

        def log_message(self, *_):
            pass

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", content, asked
        http.shutdown()
