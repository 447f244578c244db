"""Compare the time and memory of this code with the published formulation on this machine; prints Markdown.

    python -m benchmarks.benchmark [train|ddp|eval|data|policies|methods|optimizer|memory|all] [--quick] [--output FILE]

The published formulation (published_formulation.py) differs from ours only by the named optimizations. The program
first proves in float64 that the two compute the same, and stops if they do not. All variants of a table are called in
turn, round after round, after warm-up rounds. A row has the medians (and quartiles), their ratio, and the smallest
ratio wanted. bf16 is measured on CUDA and on CPUs with avx512_bf16.
"""

import argparse
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from datetime import date
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
from PIL import Image
from timm.utils import ModelEmaV3
from torch.utils.data import default_collate

import confidence
import models
import utils
from benchmarks import published_formulation as published
from benchmarks.interleaved import Line, measure, milliseconds, profiled, table
from benchmarks.variants import (
    DECAY,
    VARIANTS,
    batch,
    build_labeller,
    build_step,
    flags,
    has_bf16,
    network,
    prove,
    random_logits,
)
from datasets import build_training_sets
from pseudo_labels import POLICIES, select_targets
from tests.equality import same
from training import optimization

ROOT = Path(__file__).resolve().parents[1]
TRAIN = [
    Line("fp32", "published fp32", "ours fp32", 1.20),
    Line("bf16", "published fp32", "ours bf16", 1.85),
    Line("bf16 `--compile`", "published fp32", "ours bf16 --compile", 2.4),
    Line("bf16, both", "published bf16", "ours bf16"),
    Line("bf16, both, ours `--compile`", "published bf16", "ours bf16 --compile"),
]
ON_GPU = [*TRAIN[3:], Line("ours fp16", "published bf16", "ours fp16")]
DDP = [Line(name, f"ours {name}", f"ours {name} under DDP") for name in ("fp32", "bf16", "bf16 --compile")]
ALONE = [
    Line(f"{name} alone", "published fp32", name)
    for name in ("pool first", "enlarge last", "channels_last", "SDPA", "bf16", "compile", "fused AdamW", "foreach EMA")
]
MEMORY = {  # variant: largest peak wanted, as a share of published fp32
    "published fp32": 1.0,
    "ours fp32": 0.92,
    "ours bf16": 0.70,
    "ours fp32 --grad-checkpointing": 0.62,
    "ours bf16 --grad-checkpointing": 0.52,
}


# -------------------------------------------------------------------------------- the parts


def _calls(lines, make, args):
    """{name: make(name)} of all calls that the lines compare, without bf16 ones where bf16 is slow."""
    names = dict.fromkeys(name for line in lines for name in (line.published, line.ours))
    return {name: make(name) for name in names if "bf16" not in name or has_bf16(args.device)}


def train(args):
    """The training step, then the published step with each optimization alone."""
    labelled, unlabelled = args.sizes
    head = f"### Training step: {labelled} labelled, {unlabelled} strong and {unlabelled} weak images\n\n"
    lines = TRAIN if args.device.type == "cpu" else ON_GPU
    tables = []
    for each in (lines, ALONE):
        calls = _calls(each, lambda name: build_step(args, VARIANTS[name])[0], args)
        tables.append(table(each, calls, args, images=labelled + unlabelled))
        if args.profile and each is lines:
            profiles = [f"{name}:\n\n{profiled(call, args)}" for name, call in calls.items()]
        calls.clear()  # each variant holds weights, gradients, moments and average of its own
        gc.collect()
    text = head + "\n\nEach optimization alone, in the published step:\n\n".join(tables)
    return "\n\n".join([text, *profiles]) if args.profile else text


def ddp(args):
    """The step under DDP beside the same step alone: one NCCL rank on a GPU, two gloo ranks of one thread on a CPU."""
    cuda = args.device.type == "cuda"
    words = [
        "--device",
        str(args.device),
        "--model",
        args.model,
        "--input-size",
        str(args.input_size),
        "--threads",
        "1",
    ]
    words += ["--rounds", str(args.rounds)] + ["--quick"] * args.quick
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={1 if cuda else 2}", "-m"]
    command = [sys.executable, *torchrun, "benchmarks.benchmark", "ddp", *words, "--rank"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError("Cannot measure the step under DDP: see its error above.")
    ranks = "one rank, NCCL" if cuda else "two ranks, gloo, a thread each"
    return f"### Under DDP: {ranks}\n\n" + done.stdout.strip()


def ddp_rank(args):
    """What a rank of `ddp` measures: the table, on the first one."""
    if not dist.is_initialized():
        device = torch.device("cuda", torch.cuda.current_device())
        dist.init_process_group("nccl", store=dist.HashStore(), world_size=1, rank=0, device_id=device)
    lines = DDP[1:] if args.device.type == "cuda" else DDP
    calls = _calls(lines, lambda name: build_step(args, VARIANTS[name])[0], args)
    text = table(lines, calls, args, headers=("alone, ms", "under DDP, ms", "alone / under DDP"))
    rank = dist.get_rank()
    utils.leave_group()
    return "" if rank else text


def evaluation(args):
    """The forward pass of an evaluation batch; ours has BatchNorm folded into the convolutions and channels_last."""
    model, images = network(args), batch(args, args.batch, 0)[0][0]
    with torch.no_grad():
        model(images)  # in train mode, so that BatchNorm has statistics of images, as after training
    model.eval()
    networks = {"published": published.as_published(model), "ours": models.fold_batchnorm(model)}
    networks |= {name: published.as_published(model, (name,)) for name in (*published.PARTS, "channels_last")}
    networks |= {"bf16": networks["published"], "folded": models.fold_batchnorm(networks["published"])}

    def make(name):
        autocast, _, _ = optimization.mixed_precision("bf16" if "bf16" in name else "off", args.device)
        chosen = networks[name.removesuffix(" bf16").removesuffix(" fp32")]

        @torch.no_grad()
        def forward():
            with autocast():
                return chosen(images)

        return forward

    lines = [Line("fp32", "published fp32", "ours fp32", 1.7), Line("bf16", "published fp32", "ours bf16", 3.3)]
    lines += [Line("bf16, both", "published bf16", "ours bf16")]
    lines += [Line(f"{name} alone", "published fp32", name) for name in list(networks)[2:]]
    head = f"### Evaluation: a batch of {args.batch} images\n\n"
    calls = _calls(lines, make, args)
    text = head + table(lines, calls, args, images=args.batch)
    if args.profile:
        ours = {name: calls[name] for name in ("ours fp32", "ours bf16") if name in calls}
        text += "".join(f"\n\n{name}:\n\n{profiled(call, args)}" for name, call in ours.items())
    return text


def photo(path, seed):
    """Write a 500 x 375 JPEG file of quality 90, smooth gradients with noise, as compressible as a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((500, 375), Image.BICUBIC)
    noisy = np.asarray(coarse, dtype=float) + rng.normal(0, 8, (375, 500, 3))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


@contextmanager
def one_thread():
    """A context in which PyTorch uses one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def data(args):
    """Decoding and augmenting a JPEG file twice, on one core.

    Raises ValueError if the published pixels and those of the default backend differ.
    """
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        for i in range(args.photos):
            Path(folder, "train", f"class{i % 2}").mkdir(parents=True, exist_ok=True)
            photo(Path(folder, "train", f"class{i % 2}", f"{i}.jpg"), i)
        words = ["--data-set", "SEMI-IMNET", "--data-path", folder, "--input-size", args.input_size]

        def ours(*more):
            return build_training_sets(flags(*words, *more), semi_supervised=True)[1]

        pixel_exact, fast = ours(), ours("--data-backend", "fast")
        baseline, finish = published.PillowToFloat(args.input_size), fast.finish(0, torch.device("cpu"))
        files = [Path(folder, "train", pixel_exact.samples.source.path(i)) for i in range(args.photos)]
        makers = {
            "published": lambda: default_collate([baseline(file) for file in files]),
            "ours, pixel-exact": lambda: default_collate([pixel_exact[i] for i in range(args.photos)]),
            "ours, uint8": lambda: default_collate([fast[i] for i in range(args.photos)]),
            "ours, float": lambda: finish(makers["ours, uint8"]()),
        }

        def batch_of(name, rounds):
            utils.seed_everything(next(rounds))  # the same crops and augmentations for all, different in each round
            return makers[name]()

        theirs, mine = (list(batch_of(name, count())[:2]) for name in ("published", "ours, pixel-exact"))
        if not same(theirs, mine):
            raise ValueError("The published views and those of --data-backend pil differ: correct transforms.py.")
        calls = {name: partial(batch_of, name, count()) for name in makers}
        lines = [
            Line("`fast`, uint8 out", "published", "ours, uint8", 1.9),
            Line("`fast`, float out", "published", "ours, float", 1.7),
            Line("`pil`, the default: equal pixels", "published", "ours, pixel-exact", 1.0),
        ]
        text = table(lines, calls, args, images=args.photos)
    return f"### Strong and weak view of {args.photos} JPEGs of 500 x 375, one core\n\n" + text


def policies(args):
    """The pseudo labels of 95 images, by every Vote and weight policy."""
    logits, names = random_logits(args), [name for name in POLICIES if name.startswith(("Vote", "weight"))]
    both = {"published": published.select_targets, "ours": select_targets}
    calls = {f"{who} {name}": partial(both[who], *logits, name, 0.7, 1.0) for name in names for who in both}
    lines = [Line(f"`{name}`", f"published {name}", f"ours {name}", 5) for name in names]
    with one_thread():  # starting a second one takes longer than the work
        text = table(lines, calls, args, times=10)
    return f"### Policies, {len(logits[0])} x {args.classes} logits, one core\n\n" + text


def methods(args):
    """The pseudo labels of 95 images by each confidence rule, and the step of later methods beside the published."""
    logits, index, calls = random_logits(args), torch.arange(95, device=args.device), {}
    for rule in confidence.RULES:
        for align in ("none", "labelled"):
            labeller = build_labeller(args, "cnn", rule, align, images=index if rule == "flex" else None)
            calls[rule, align] = partial(labeller, logits, index, [x[:13] for x in logits])
    with one_thread(), torch.no_grad():
        seconds = measure(calls, args.rounds * 10, args.warmup, args.device)
    rows = [f"### Later methods: labels of 95 x {args.classes} logits, one core\n"]
    rows += ["| rule | ms | at most | with `--align labelled`, ms |", "|---|---|---|---|"]
    for rule in confidence.RULES:
        rows.append(
            f"| `{rule}` | {milliseconds(seconds[rule, 'none'])} | 1 | {milliseconds(seconds[rule, 'labelled'])} |"
        )
    labelled, unlabelled = args.sizes
    rows += [f"\n### Later methods: step of {labelled} labelled, {unlabelled} strong and {unlabelled} weak images\n"]
    calls = {name: build_step(args, VARIANTS[name])[0] for name in ("ours fp32", "ema, free, shares", "soft, uniform")}
    seconds = measure(calls, args.rounds, args.warmup, args.device)
    published = np.median(seconds.pop("ours fp32"))
    rows += ["| | ms | over the published method's | at most |", "|---|---|---|---|"]
    rows += [f"| published method | {published * 1000:.4g} | | |"]
    for name, took in seconds.items():
        rows.append(f"| {name} | {milliseconds(took)} | **{np.median(took) / published:.3f}** | 1.05 |")
    return "\n".join(rows)


def optimizer(args):
    """An AdamW step and an update of the moving average, on the network's parameters with random gradients."""
    given, model = flags("--opt", "adamw", "--lr", "1e-3"), network(args)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    calls = {
        "published AdamW": published.adamw(given, model).step,
        "ours AdamW": optimization.build_optimizer(given, model).step,
        "published EMA": partial(published.PerTensorEma(model, DECAY).update, model),
        "ours EMA": partial(ModelEmaV3(model, decay=DECAY).update, model),
    }
    lines = [Line("AdamW", "published AdamW", "ours AdamW", 2.3), Line("EMA", "published EMA", "ours EMA", 2.2)]
    size = sum(p.numel() for p in model.parameters())
    return f"### Optimizer and moving average, {size:,} parameters\n\n" + table(lines, calls, args, times=3)


def peak_of(args, variant):
    """Peak memory in bytes of the second step, with all that the process holds for training.

    Must be called in a fresh process.
    """

    def resident(field):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) * 1024

    before = resident("VmRSS")
    step = build_step(args, variant)[0]
    step()
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
    step()
    return resident("VmHWM") - before


def memory(args):
    """The peak memory of a step, with each variant in its own process."""
    peaks = {}
    words = ["--device", str(args.device), "--model", args.model, "--input-size", str(args.input_size)]
    words += ["--threads", str(args.threads)] + ["--quick"] * args.quick
    # Makes malloc return freed tensors above 64 KB to the system, instead of keeping what the first step freed.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for name in MEMORY:
        if "bf16" in name and not has_bf16(args.device):
            continue
        command = [sys.executable, "-m", "benchmarks.benchmark", "memory", *words, "--variant", name]
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise ValueError(f"Cannot measure the memory of {name}: see its error above.")
        peaks[name] = json.loads(done.stdout.splitlines()[-1])
    labelled, unlabelled = args.sizes
    rows = [f"### Peak memory of the step: {labelled} labelled, {unlabelled} strong and {unlabelled} weak images\n"]
    rows += ["| | MB | of published fp32 | at most |", "|---|---|---|---|"]
    for name, most in MEMORY.items():
        if name in peaks:
            rows.append(
                f"| {name} | {peaks[name] / 2**20:.0f} | **{peaks[name] / peaks['published fp32']:.2f}** | {most} |"
            )
        else:
            rows.append(f"| {name} | not run: no avx512_bf16 | | {most} |")
    return "\n".join(rows)


# -------------------------------------------------------------------------------- the report

PARTS = {
    "train": train,
    "ddp": ddp,
    "eval": evaluation,
    "data": data,
    "policies": policies,
    "methods": methods,
    "optimizer": optimizer,
    "memory": memory,
}
FULL = dict(model="Semiformer_small_patch16", input_size=224, rounds=10, warmup=2, batch=32, photos=16, classes=1000)
QUICK = dict(model="Semiformer_micro_patch16", input_size=32, rounds=2, warmup=1, batch=4, photos=2, classes=10)


def with_defaults(args):
    """Fill in the defaults of all arguments and set the number of threads. ValueError if the device is missing."""
    for name, value in (QUICK if args.quick else FULL).items():
        setattr(args, name, getattr(args, name, None) or value)
    args.device = utils.init_distributed(args.device)
    args.backend = "eager" if args.quick else "inductor"  # inductor takes minutes to compile
    args.sizes = (1, 7) if args.device.type == "cpu" else (13, 95)
    torch.set_num_threads(args.threads)
    return args


def machine(args):
    """A line on the date, the machine, the versions and the settings."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    model = re.search(r"model name\s*: (.*)", text)
    env, bf16 = utils.environment(), "with" if "avx512_bf16" in text else "without"
    gpu = f", {env['gpu']}" if args.device.type == "cuda" else ""
    versions = ", ".join(f"{name} {env[name]}" for name in ("python", "torch", "torchvision", "timm"))
    return (
        f"{date.today()}, {model[1] if model else platform.processor()}, {os.cpu_count()} cores {bf16} avx512_bf16"
        f"{gpu}; {args.threads} threads, load {os.getloadavg()[0]:.1f} at the start; {versions}, Pillow "
        f"{PIL.__version__}; revision {env['revision']}. {args.model}, {args.input_size} px, {args.rounds} rounds "
        f"after {args.warmup} of warm-up; medians (quartiles)."
        + (" `--quick`: the times are meaningless." if args.quick else "")
    )


def machine_speed(args):
    """A sentence on the speed of the machine itself, which bounds what any row of a table can reach."""
    side = 8192 if args.device.type == "cuda" else 2048  # a smaller product does not fill a GPU
    square, line = torch.randn(side, side, device=args.device), torch.randn(2**25, device=args.device)
    half, other = square.bfloat16(), torch.empty_like(line)
    calls = {"fp32": lambda: square @ square, "bf16": lambda: half @ half, "copy": lambda: other.copy_(line)}
    seconds = {name: float(np.median(took)) for name, took in measure(calls, 10, 2, args.device).items()}
    fp32, bf16 = (2 * side**3 / seconds[name] / 1e9 for name in ("fp32", "bf16"))
    copied = 2 * line.nbytes / seconds["copy"] / 1e9
    return (
        f"The machine multiplies {side} x {side} matrices at {fp32:.0f} GFLOP/s in fp32 and {bf16:.0f} GFLOP/s in "
        f"bf16, and copies {copied:.0f} GB/s."
    )


def get_parser():
    """The parser of this program's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="all", choices=[*PARTS, "all"], help="what to measure")
    parser.add_argument("--quick", action="store_true", help="two rounds of a tiny network, to see that it runs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--model", help=f"two-stream network (default: {FULL['model']})")
    parser.add_argument("--input-size", type=int, help="side of the images in pixels (default: 224)")
    parser.add_argument("--rounds", type=int, help="rounds after the warm-up (default: 10; more for short calls)")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="CPU threads; `data`, `policies` and labels always use one"
    )
    parser.add_argument("--profile", action="store_true", help="add profiles of `train` and `eval`")
    parser.add_argument("--output", type=Path, help="append the Markdown to this file instead of printing it")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--variant", choices=MEMORY, help="print the peak memory of this variant (used by `memory`)")
    return parser


def report(args):
    """The Markdown of the chosen part, or of all parts."""
    chosen = PARTS.values() if args.part == "all" else [PARTS[args.part]]
    return "\n\n".join([machine(args), machine_speed(args), prove(args), *(part(args) for part in chosen)])


def main():
    """Prove that both formulations compute the same, measure them, and print or append the report."""
    args = get_parser().parse_args()
    try:
        args = with_defaults(args)
        if args.variant:
            text = str(peak_of(args, VARIANTS[args.variant]))
        else:
            text = ddp_rank(args) if args.rank else report(args)
        if args.output is None:
            print(text, end="\n" if text else "")
        else:
            with utils.writing(args.output), args.output.open("a", encoding="utf-8") as file:
                file.write(f"\n{text}\n")
    except (ValueError, OSError) as error:
        sys.exit(f"benchmark.py: error: {error}")


if __name__ == "__main__":
    main()
