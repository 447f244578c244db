"""Check everything that only a GPU can show, in at most eight minutes: correctness, waits, speed, memory, resuming.

    python -m benchmarks.accept_gpu --output accept                       # on a machine with a GPU
    python -m benchmarks.accept_gpu --device cpu --quick --output accept  # that the program itself works, in 45 s

Each part runs in a process of its own, which is ended at its limit, and prints into OUTPUT/<part>.txt. The table,
`| PASS or FAIL | part | figure |`, is also written to OUTPUT/table.md. Exits with status 1 if a part fails. On a CPU
the parts that need CUDA are skipped.
"""

import argparse
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from timm.layers import DropPath
from torch.nn.parallel import DistributedDataParallel

import engine
import semi_main
import utils
from benchmarks.benchmark import one_thread, photo
from benchmarks.interleaved import clock, measure, profiled
from benchmarks.variants import RECIPE, Variant, batch, build_labeller, build_step, flags, network
from images.fast_transforms import DeviceFinish
from images.loading import to_device
from models import fold_batchnorm
from tests.proofs import prove_resume
from training.checkpoint import TrainState
from training.optimization import build_optimizer, build_scheduler, mixed_precision

FORK = multiprocessing.get_context("fork")  # the parts do not import again; this process itself never touches a GPU
FULL = dict(model="Semiformer_small_patch16", input_size=224, classes=1000, sizes=(13, 95), rounds=10, photos=400)
QUICK = dict(model="Semiformer_micro_patch16", input_size=48, classes=10, sizes=(2, 6), rounds=2, photos=12)
MOST_MS = {r"\bH100\b(?!.*MIG)": 55, r"\bH200\b(?!.*MIG)": 45}  # of a compiled bf16 step of 13 + 95 + 95 images
EXACT, NEAR = 1e-9, 0.02


def _relative(one, other):
    """Largest difference of two lists of tensors, relative to the largest number of the second; NaN where one is."""
    one, other = ([tensor.detach().double().cpu() for tensor in each] for each in (one, other))
    largest = torch.stack([tensor.abs().max() for tensor in other]).max()
    return float(torch.stack([(a - b).abs().max() for a, b in zip(one, other, strict=True)]).max() / largest)


# -------------------------------------------------------------------------------- the parts: args -> (passed, figure)


def card(args):
    """The GPU, and the speed of its products and copies, which bounds everything below."""
    utils.check_device(args.device.type)
    n = 8192
    a, b = (torch.randn(n, n, device=args.device, dtype=torch.bfloat16) for _ in range(2))
    here, there = torch.empty(2**28, device=args.device), torch.empty(2**28, device=args.device)
    host = torch.empty(2**26).pin_memory()
    calls = {
        "product": lambda: a @ b,
        "copy": lambda: there.copy_(here),
        "upload": lambda: there[: len(host)].copy_(host, non_blocking=True),
    }
    took = {name: float(np.median(seconds)) for name, seconds in measure(calls, 10, 3, args.device).items()}
    capability = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return True, (
        f"{torch.cuda.get_device_name()}, {capability} of {' '.join(torch.cuda.get_arch_list())}, torch "
        f"{torch.__version__}; bf16 {2 * n**3 / took['product'] / 1e12:.0f} TFLOP/s, copies "
        f"{2 * here.nbytes / took['copy'] / 1e9:.0f} GB/s, from the host {host.nbytes / took['upload'] / 1e9:.0f} GB/s"
    )


def exact(args):
    """float64 on the device against the CPU: losses, gradients and weights of a step; bf16 against float32; pixels."""

    def step(device, dtype, bf16=False):
        here = argparse.Namespace(**{**vars(args), "device": torch.device(device)})
        run, model, _ = build_step(here, Variant(ours=True, bf16=bf16), dtype, (2, 3), replace(RECIPE, threshold=0.1))
        for module in model.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0  # what it drops is drawn on the device
        parts = run()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            logits = model.eval()(batch(here, 4, 1, dtype)[0][0])
        return {"losses": list(parts.values()), "gradients": gradients, "weights": model.parameters(), "logits": logits}

    both = [step(device, torch.float64) for device in (args.device, "cpu")]
    found = {name: _relative(both[0][name], both[1][name]) for name in both[0]}
    losses = [float(step(args.device, torch.float32, bf16)["losses"][-1]) for bf16 in (False, True)]
    near = abs(losses[1] / losses[0] - 1)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    finished = [
        DeviceFinish(0, torch.device(device))([images.to(device), torch.zeros(4), torch.zeros(4)])[0]
        for device in (args.device, "cpu")
    ]
    found["pixels"] = _relative(finished[:1], finished[1:])
    passed = all(found[name] <= EXACT for name in both[0]) and found["pixels"] < 1e-6 and near < NEAR
    words = ", ".join(f"{name} {difference:.0e}" for name, difference in found.items())
    return passed, f"float64 from the CPU's: {words}; loss in bf16 {near:.1e} from float32's"


def _state(args, precision, rule="fixed", align="none", average=False):
    """A TrainState with a schedule, its network, and the autocast factory, as a run builds them."""
    given = flags("--opt", "adamw", "--lr", "1e-4", "--epochs", "100", "--warmup-epochs", "0")
    autocast, scaler, _ = mixed_precision(precision, args.device)
    model = network(args)
    optimizer = build_optimizer(given, model)
    index = torch.arange(args.sizes[1]) if rule == "flex" else None
    state = TrainState(model, optimizer, build_scheduler(given, optimizer), scaler, semi_main._average(given, model))
    state.labeller = build_labeller(args, "cnn", rule, align, images=index)
    return state, state.ema.module if average else model, autocast


def _epoch(args, state, teacher, autocast, steps, recipe=RECIPE):
    labelled, unlabelled = batch(args, *args.sizes)
    unlabelled = (*unlabelled, torch.arange(args.sizes[1], device=args.device))
    given = ([pair] * steps for pair in (labelled, unlabelled))
    return engine.train_one_epoch(
        state, state.model, teacher, *given, recipe, epoch=0, steps=steps, autocast=autocast, clip_grad=5.0
    )


class _Strict(utils.EpochLog):
    """An EpochLog under which any wait for the GPU raises RuntimeError, except where a line is due."""

    def timed(self, batches):
        for number, each in enumerate(super().timed(batches)):
            # In its first steps an optimizer allocates its state, and libraries choose their kernels.
            torch.cuda.set_sync_debug_mode("error" if number > 2 else "default")
            yield each

    def is_due(self, step):
        due = super().is_due(step)
        if due:
            torch.cuda.set_sync_debug_mode("default")
        return due


def waits(args):
    """25 steps of the real training loop do not wait for the GPU, but for their printed lines."""
    engine.EpochLog, words = _Strict, []
    for precision, rule, align, average in (
        ("bf16", "fixed", "none", False),
        ("fp16", "fixed", "none", False),
        ("bf16", "flex", "none", False),
        ("bf16", "free", "uniform", True),
        ("bf16", "soft", "labelled", True),
    ):
        state, teacher, autocast = _state(args, precision, rule, align, average)
        recipe = replace(RECIPE, fairness_lambda=0.01 if rule == "free" else 0.0)
        _epoch(args, state, teacher, autocast, 25, recipe)
        words.append(f"{precision} {rule}")
    return True, f"25 steps each without a wait: {', '.join(words)}"


@contextmanager
def _group(args, world, rank, meeting, backend):
    index = {"device_id": args.device} if backend == "nccl" else {}
    dist.init_process_group(backend, init_method=f"file://{meeting}", world_size=world, rank=rank, **index)
    try:
        yield
    finally:
        utils.leave_group()


def _in_group(args, world, rank, meeting, backend, out):
    """One rank: what every collective of ours gives, and the gradients of an eager and a compiled network under DDP."""
    args.device = torch.device(args.device.type, 0 if args.device.type == "cuda" else None)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    with _group(args, world, rank, meeting, backend):
        right = utils.gather(rank) == list(range(world)) and utils.on_main(lambda: "said") == "said"
        total = torch.ones(3, device=args.device)
        utils.sum_over_ranks(total)
        norm = torch.nn.BatchNorm2d(3).to(args.device)
        norm.running_mean += rank + 1
        utils.broadcast_buffers(norm)
        right &= total.tolist() == [world] * 3 and norm.running_mean.tolist() == [1] * 3
        gradients, alone = [], []
        images = batch(args, 4, 1, torch.float64)[0][0]
        for factor in range(1, world + 1):  # what every rank computes, and their mean
            model = network(args, torch.float64).eval()  # without stochastic depth
            sum(x.square().sum() for x in model(images * factor)).backward()
            alone.append([p.grad for p in model.parameters() if p.grad is not None])
        mean = [torch.stack(same).mean(0) for same in zip(*alone)]
        for compiled in (False, True):
            model = network(args, torch.float64).eval()
            if compiled:
                model.compile(backend=args.backend)
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
            sum(x.square().sum() for x in wrapped(images * (rank + 1))).backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        Path(out).write_text(json.dumps([bool(right), max(_relative(each, mean) for each in gradients)]))


def group(args):
    """Our collectives and DDP, eager and compiled: one rank (NCCL on a GPU), and two gloo ranks on one device."""
    words, passed = [], True
    small = {"model": QUICK["model"], "input_size": 64}  # compiled in float64 it takes seconds, not minutes
    args = argparse.Namespace(**{**vars(args), **small})
    first = "nccl" if args.device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        for backend, world in ((first, 1), ("gloo", 2)):
            outs = [f"{folder}/{backend}{world}.{rank}" for rank in range(world)]
            ranks = [
                FORK.Process(target=_in_group, args=(args, world, rank, f"{folder}/meet{world}", backend, out))
                for rank, out in enumerate(outs)
            ]
            for each in ranks:
                each.start()
            for each in ranks:
                each.join()
            if any(each.exitcode for each in ranks):
                return False, f"{world} rank(s), {backend}: ended with {[each.exitcode for each in ranks]}"
            results = [json.loads(Path(out).read_text()) for out in outs]
            passed &= all(right and difference <= EXACT for right, difference in results)
            words.append(f"{backend}, {world} rank(s): DDP from the mean of its ranks {max(d for _, d in results):.0e}")
    return passed, "; ".join(words)


def speed(args):
    """Time of a step, eager and compiled, in each precision; top kernels and the share of idle time in the text."""
    took, lines, cuda = {}, [], args.device.type == "cuda"
    variants = {"bf16": Variant(ours=True, bf16=True), "bf16 checkpointed": Variant(True, True, checkpointed=True)}
    if cuda:
        variants |= {"fp16": Variant(ours=True, fp16=True), "bf16 compiled": Variant(True, True, compiled=True)}
    for name, variant in variants.items():
        call = build_step(args, variant)[0]
        for _ in range(3):
            call()
        took[name] = 1000 * float(np.median([clock(call, args.device) for _ in range(args.rounds)]))
        if cuda and name in ("bf16", "bf16 compiled"):
            lines.append(f"### {name}\n\n{profiled(call, args)}")
        del call
    print("\n\n".join(lines))
    name = torch.cuda.get_device_name() if cuda else ""
    most = next((most for pattern, most in MOST_MS.items() if re.search(pattern, name)), None)
    passed = most is None or took["bf16 compiled"] <= most
    images = sum(args.sizes)
    words = ", ".join(f"{name} {ms:.1f} ms ({images * 1000 / ms:.0f} images/s)" for name, ms in took.items())
    return passed, f"step of {args.sizes[0]} + {args.sizes[1]} + {args.sizes[1]} images: {words}" + (
        f"; compiled at most {most} ms" if most else ""
    )


def memory(args):
    """Peak memory of 108 and of 54 images, and whether the reserved memory stays flat over 20 epochs."""
    peaks, reserved = {}, []
    for sizes in ((6, 48), (13, 95)):
        here = argparse.Namespace(**{**vars(args), "sizes": sizes})
        state, teacher, autocast = _state(here, "bf16")
        torch.cuda.reset_peak_memory_stats()
        _epoch(here, state, teacher, autocast, 3)
        peaks[sum(sizes)] = torch.cuda.max_memory_allocated() / 2**30
        del state, teacher
    here = argparse.Namespace(**{**vars(args), "sizes": (6, 48)})
    state, teacher, autocast = _state(here, "bf16")
    pairs = [[[tensor.cpu().pin_memory() for tensor in pair]] * 4 for pair in batch(here, 6, 48)]
    for _ in range(20):
        given = (to_device(iter(pair), args.device) for pair in pairs)
        engine.train_one_epoch(state, state.model, teacher, *given, RECIPE, epoch=0, steps=4, autocast=autocast)
        reserved.append(torch.cuda.memory_reserved() / 2**30)
    words = ", ".join(f"{images} images {peak:.1f} GB" for images, peak in peaks.items())
    words += f"; reserved after 5 and 20 epochs {reserved[4]:.2f}, {reserved[-1]:.2f} GB"
    return reserved[-1] <= reserved[4], words


def resume(args):
    """A run that is killed and resumed ends with the same bits; on a GPU that is required of --deterministic alone."""
    words, passed = [], True
    for more in ([], ["--deterministic"]) if args.device.type == "cuda" else ([],):
        with tempfile.TemporaryDirectory() as work:
            work = Path(work)
            prove_resume.make_images(work / "data")
            row = prove_resume.one_kill(1, 0, work / "data", work, {}, "--device", args.device.type, *more)
            print(row)
        passed &= row[-1] == "yes" or not (more or args.device.type == "cpu")
        words.append(f"{more[0] if more else 'default'}: identical end after a kill: {row[-1]}")
    return passed, "; ".join(words)


def data(args):
    """Images a second and core of both backends, and the share of a real run's time that the host waits for images.

    On a GPU, which works behind the host, a share below that of its own work costs nothing.
    """
    figures, cuda = [], args.device.type == "cuda"
    labelled, steps = args.sizes[0], 30 if cuda else 4
    with tempfile.TemporaryDirectory() as folder:
        for i in range(args.photos):
            for part in ("train", "val") if i < 8 else ("train",):
                Path(folder, part, f"c{i % 2}").mkdir(parents=True, exist_ok=True)
                photo(Path(folder, part, f"c{i % 2}", f"{i}.jpg"), i % 20)
        for backend in ("pil", "fast"):
            words = f"""--data-set SEMI-IMNET --data-path {folder} --data-backend {backend} --select-ratio 0.9
                --model {args.model} --input-size {args.input_size} --batch-size {sum(args.sizes)}
                --mu {labelled / sum(args.sizes)} --steps-per-epoch {steps} --epochs 1 --semi-start-epoch 0
                --device {args.device} --amp bf16 --num_workers {10 if cuda else 0}"""
            given = flags(*words.split())
            run = semi_main.Run(semi_main.options.fit_workers(given), args.device)
            loaded, start, paces = min(len(run.unlabelled), 60), time.perf_counter(), []
            with one_thread():
                for i in range(loaded):
                    run.unlabelled[i]
            rate = loaded / (time.perf_counter() - start)
            run.tensorboard = argparse.Namespace(
                writer=lambda _, paces=paces: lambda step, scalars: paces.append(scalars), add=lambda *_: None
            )
            run.train_epoch(0)
            pace = paces[1:] or paces  # the first line has the start of the workers
            share = sum(each["data_seconds"] for each in pace) / sum(each["step_seconds"] for each in pace)
            figures.append(f"{backend} {rate:.0f} images/s a core (two views), the host waits {share:.0%} of a step")
    return True, "; ".join(figures) + f"; {os.cpu_count()} cores"


def evaluation(args):
    """Images a second of the evaluation in each precision, and how near its logits are to float32's."""
    images = batch(args, 4 * sum(args.sizes), 1)[0][0]
    model = network(args)
    with torch.no_grad():
        model(images)  # statistics of images
    folded, words, passed, logits = fold_batchnorm(model.eval()), [], True, {}
    for precision in ("off", "bf16", "fp16") if args.device.type == "cuda" else ("off", "bf16"):
        autocast = mixed_precision(precision, args.device)[0]

        @torch.no_grad()
        def forward(autocast=autocast):
            with autocast():
                return sum(folded(images)).float()

        logits[precision] = forward()
        took = np.median([clock(forward, args.device) for _ in range(args.rounds)])
        difference = _relative([logits[precision]], [logits["off"]])
        passed &= difference < NEAR
        words.append(f"{precision} {len(images) / took:.0f} images/s, logits {difference:.0e} from float32's")
    return passed, "; ".join(words)


PARTS = {  # name: (function, limit in seconds, whether it needs CUDA)
    "card": (card, 20, True),
    "exact": (exact, 45, False),
    "waits": (waits, 45, True),
    "group": (group, 60, False),
    "speed": (speed, 110, False),
    "memory": (memory, 30, True),
    "resume": (resume, 100, False),
    "data": (data, 40, False),
    "evaluation": (evaluation, 30, False),
}


# -------------------------------------------------------------------------------- running them


def _run(name, args, output):
    """In a forked process: run a part; its prints go to OUTPUT/<name>.txt, its result to <name>.json."""
    os.setsid()  # so that its limit also ends what it has started
    with open(output / f"{name}.txt", "wb") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
    args.device = torch.device(args.device)
    if args.device.type == "cpu":
        torch.set_num_threads(1)
    passed, figure = PARTS[name][0](args)  # an error ends the process, with its traceback in the text
    (output / f"{name}.json").write_text(json.dumps([bool(passed), figure]))


def outcome(name, args):
    """(verdict, figure) of a part: PASS or FAIL; it is ended at its limit."""
    _, limit, needs_cuda = PARTS[name]
    if needs_cuda and args.device == "cpu":
        return "PASS", "skipped: no CUDA"
    result = args.output / f"{name}.json"
    result.unlink(missing_ok=True)
    process = FORK.Process(target=_run, args=(name, args, args.output))
    process.start()
    process.join(limit)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return "FAIL", f"ended at its limit of {limit} s; see {name}.txt"
    if not result.is_file():
        errors = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", (args.output / f"{name}.txt").read_text(), re.MULTILINE)
        cause = errors[-1] if errors else f"ended with status {process.exitcode}"
        return "FAIL", f"{cause}; see {name}.txt"
    passed, figure = json.loads(result.read_text())
    return "PASS" if passed else "FAIL", figure


def get_parser():
    """The parser of this program's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a tiny network, to see that the program runs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="run only these parts")
    parser.add_argument("--output", type=Path, default=Path("output/accept"), help="folder (default: %(default)s)")
    return parser


def main():
    """Run the parts, print the table and write it."""
    args = get_parser().parse_args()
    try:
        utils.check_device_name(args.device)
        with utils.writing(args.output, "--output"):
            args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        sys.exit(f"accept_gpu.py: error: {error}")
    if args.device == "cuda" and not torch.cuda.device_count():
        sys.exit("accept_gpu.py: error: PyTorch sees no CUDA GPU here: pass --device cpu --quick to try the program.")
    for name, value in (QUICK if args.quick else FULL).items():
        setattr(args, name, value)
    args.backend = "aot_eager" if args.quick else "inductor"
    start, rows, failed = time.time(), ["| | part | figure |", "|---|---|---|"], False
    print("\n".join(rows), flush=True)
    for name in args.only:
        verdict, figure = outcome(name, args)
        failed |= verdict == "FAIL"
        rows.append(f"| {verdict} | {name} | {utils.printable(figure, kept='').replace('|', '/')} |")
        print(rows[-1], flush=True)
    print(f"\n{time.time() - start:.0f} s")
    utils.write_atomic(args.output / "table.md", "\n".join(rows) + "\n", "--output")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
