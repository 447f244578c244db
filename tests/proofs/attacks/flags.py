"""Attacks by the command line of semi_main.py and predict.py, and by what a download brings."""

import functools
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.proofs.attacks.machine import predicting
from tests.proofs.attacks.sandbox import REFUSED, REPORTED, add_run, cases, command, train


def given(words):
    """Prepare a run with these flags, a text."""
    return lambda box: train(*words.split())


class _Answers(BaseHTTPRequestHandler):
    """Answers /page with a web page, /half with half of a file, /error with an error, and the rest with nothing."""

    def do_GET(self):
        """Answer one request."""
        half, page = self.path.startswith("/half"), b"<!DOCTYPE html><html>Sign in</html>"
        content = page if self.path.startswith("/page") else b"PK\3\4" + bytes(996) if half else b""
        self.send_response(500 if self.path.startswith("/error") else 200)
        self.send_header("Content-Length", str(len(content) * (1 + half)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Print nothing."""


@functools.cache
def _server():
    """The address of a server on this machine, which ends with this process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def downloaded(path, flag="--resume"):
    """Prepare a run from a file of that server, or from another address."""
    return lambda box: train(flag, path if "://" in path else _server() + path, may_write=("out", "torch_home"))


FLAGS = [  # (flags, words of the message)
    ("--thresold 0.5", "--thresold"), ("--lerning-rate 1", "--lerning-rate"), ("--lr", "--lr"), ("--lr x", "--lr"),
    ("--lr nan", "--lr nan"), ("--lr 1e400", "--lr inf"), ("--lr -1", "--lr"), ("--epochs 0", "--epochs 0"),
    ("--epochs 1e3", "--epochs"), ("--epochs 1000000000000", "--epochs"), ("--batch-size 0", "--batch-size 0"),
    ("--steps-per-epoch 1000000000000", "--steps-per-epoch"), ("--mu 1.5", "--mu 1.5"), ("--mu nan", "--mu"),
    ("--mu 0", "--mu 0"), ("--threshold 1.01", "--threshold"), ("--seed x", "--seed"),
    ("--seed 100000000000000000000", "--seed"), ("--device tpu", "--device tpu"), ("--device cuda", "--device cuda"),
    ("--device cuda:99", "--device cuda"), ("--device meta", "--device meta"), ("--pseudo-type", "--pseudo-type"),
    ("--pseudo-type CNN", "--pseudo-type"), ("--aa rand-x", "--aa"), ("--aa x", "--aa"), ("--aa rand-m9-nx", "--aa"),
    ("--aa ../../etc/passwd", "--aa"), ("--remode x", "--remode"), ("--train-interpolation x", "--train-interpolat"),
    ("--opt x", "--opt"), ("--opt-betas 0.9 2", "beta"), ("--opt-betas 0.9 nan", "--opt-betas"),
    ("--sched x", "--sched"), ("--model x", "x"), ("--model ../../x", "../../x"), ("--model hf-hub:x/y", "hf-hub"),
    ("--input-size 7", "--input-size"), ("--input-size 1000000", "--input-size"), ("--drop-path 2", "--drop-path"),
    ("--scale 2 1", "--scale"), ("--num_workers -1", "--num_workers"), ("--num_workers 1000000", "too many files are"),
    ("--world_size 7", "--world_size 7"), ("--use_submitit true", "--use_submitit"), ("--use_submitit x", "submitit"),
    ("--opt-level O1", "had no effect"), ("--no-amp --amp bf16", "disagree"), ("--tensorboard --output_dir=", "--tens"),
    ("--mixup 0.8 --supervise-only --batch-size 5", "even"), ("--eval", "--eval needs --resume"),
    ("--data-path none", "none"), ("--data-set IMNET --select-ratio 0.5", "--select-ratio"),
    ("--data-set CIFAR10 --data-split-file None", "cifar"), ("--mode lcnet_050", "--mode"), ("a.pth", "a.pth"),
    ("--data-set SEMI-PLACES205 --data-split-file None", "needs --split-folder"), ("--dino-load", "--dino-load needs"),
    ("--finetune none.pth", "none.pth"), ("--dino-load-file x", "--dino-load"), ("--max-bad-images 1.5", "--max-bad"),
    ("--resume auto --overwrite", "contradict"),
]  # fmt: skip
OF_PREDICT = [
    ("--top 0", "--top 0"), ("--batch-size 0", "--batch-size"), ("--workers -1", "--workers"),
    ("--device cuda", "--device"), ("--device tpu", "--device"), ("--outputs x", "--outputs"),
    ("--output none/a.csv", "none/a.csv"), ("--output data", "data"), ("--classes data", "--classes"),
    ("--model lcnet_050", "--model"), ("--input-size 0", "--input-size"),
    ("--output data/val/class0/c0_0.png", "--output"),
]  # fmt: skip


def _with_a_fifo(flag):
    return lambda box: os.mkfifo(box / "fifo") or predicting(flag, "fifo")(box)


def _over_its_input(box):
    add_run(box, "run", "checkpoint.pth")
    image = "data/val/class0/c0_0.png"
    return command("predict.py", image, "--checkpoint", "run/checkpoint.pth", "--output", f"./{image}")


CASES = cases(
    "flags",
    *((words, given(words), REFUSED, expected) for words, expected in FLAGS),
    *((f"predict.py {words}", predicting(*words.split()), REFUSED, expected) for words, expected in OF_PREDICT),
    ("predict.py, --output is its input", _over_its_input, REFUSED, "--output"),
    ("predict.py, --output is a FIFO", _with_a_fifo("--output"), REFUSED, "--output"),
    ("predict.py, --classes is a FIFO", _with_a_fifo("--classes"), REFUSED, "--classes"),
    ("predict.py, an empty folder", predicting(images="tmp"), REFUSED, "There is no image below tmp"),
    ("predict.py, no image", predicting(images="none.png"), REPORTED, "none.png: No such file"),
    ("a download that is a web page", downloaded("/page.pth"), REFUSED, "page.pth"),
    ("a download that breaks off", downloaded("/half.pth"), REFUSED, "Cannot download .*half.pth"),
    ("a download of nothing", downloaded("/empty.pth"), REFUSED, "empty.pth"),
    ("a server's error", downloaded("/error.pth"), REFUSED, "Cannot download .*500"),
    ("a web page to finetune", downloaded("/page.pth", "--finetune"), REFUSED, "page.pth"),
    ("http from another machine", downloaded("http://192.0.2.1/a.pth"), REFUSED, "https"),
    ("a port where nobody listens", downloaded("http://127.0.0.1:9/a.pth"), REFUSED, "Cannot download"),
    ("a file:// address", downloaded("file:///etc/passwd"), REFUSED, "file:///etc/passwd"),
    ("an ftp:// address", downloaded("ftp://127.0.0.1/a.pth"), REFUSED, "ftp://"),
)
