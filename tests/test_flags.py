"""What every flag changes: for each, two command lines that differ in this flag alone, and their two results."""

import io
import json
import math
import os
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.layers import DropBlock2d, DropPath
from torch import nn

import datasets
import options
import semi_main
import utils
from images import loading
from images.decoding import UnreadableImage
from losses import Recipe, consistency, objective
from models import build_model
from pseudo_labels import select_targets
from tests.trees import make_cifar, make_fashion, make_inat, make_places, make_semi_inat, parse
from training import checkpoint, optimization

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NO_EFFECT = ("--opt-level", "--cross-attn", "--cnn2trans", "--trans2cnn", "--resplit")
KINDS = {
    "parameter group",
    "network",
    "transform",
    "mixing",
    "loss part",
    "pseudo label",
    "schedule",
    "order",
    "data",
    "loader",
    "step",
    "file",
    "printed line",
    "precision",
    "process group",
    "error",
}
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
# One quick step of one quick epoch on the tiny tree: 2 of 4 labelled and 2 of 8 unlabelled images. The network is the
# smallest of timm's, because most of the time goes into its checkpoints.
TINY = (
    "--data-set SEMI-IMNET --data-path TREE --data-split-file LIST --model lcnet_035 --input-size 32 "
    "--drop-path 0 --batch-size 4 --mu 0.5 --epochs 1 --steps-per-epoch 1 --num_workers 0 --mixup 0 "
    "--cutmix 0 --device cpu"
)
SAVED = TINY + " --output_dir OUT"
OF_A_RUN = {"checkpoint.pth", "log.txt", "run.json", "run.lock"}
REPORT = {
    prefix + name
    for prefix in ("", "ema_")
    for name in ("per_class.csv", "confusion.csv", "confusion.png", "reliability.png")
}


pytestmark = pytest.mark.usefixtures("one_thread")


def write_tree(root, classes):
    """train/ of 4 and val/ of 2 images a class; the names of half of the train images."""
    rng, labelled = np.random.default_rng(0), []
    for part, n in (("train", 4), ("val", 2)):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                image.save(root / part / name / f"{name}_{i}.png")
            labelled += [f"{name}_{i}.png" for i in range(2) if part == "train"]
    return labelled


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the capital words of the table stand for; each OUT is another folder."""
    root = tmp_path_factory.mktemp("flags")
    names = write_tree(root / "tree", ["cat", "dog"])
    write_tree(root / "tree3", ["cat", "dog", "eel"])
    (root / "list.txt").write_text("\n".join(names) + "\n")
    (root / "tree3" / "more.csv").write_text("path\ntrain/eel/eel_0.png\ntrain/eel/eel_1.png\n")
    make_cifar(root / "sets", "CIFAR10")
    make_cifar(root / "sets", "CIFAR100", (5,) * 5, 6)
    make_fashion(root / "sets")
    make_inat(root / "sets", 2018)
    make_inat(root / "sets", 2019, ((0, 1), (1, 2), (0, 3)), ((1, 4),))
    make_semi_inat(root / "sets")
    for prefix, n in (("", 4), ("5per_", 3), ("1per_", 2)):
        make_places(root / "sets", root / "lists", prefix, n, 6)
    words = {
        "TREE": root / "tree",
        "TREE3": root / "tree3",
        "LIST": root / "list.txt",
        "LIST3": root / "tree3" / "more.csv",
        "SETS": root / "sets",
        "LISTS": root / "lists",
        "CHECKPOINT": root / "start" / "checkpoint.pth",
    }
    vit = dict(embed_dim=128, depth=3, num_heads=2)
    for word, name, settings in (
        ("RESNET", "resnet10t", {}),
        ("SEMIFORMER", "Semiformer_micro_patch16", {}),
        ("VIT", "vit_tiny_patch16_224", vit),
    ):
        words[word] = root / f"{word}.pth"
        torch.save(sevens(name, **settings), words[word])
    outs = (root / f"out{i}" for i in range(1000))

    def placed(argv):
        return [str(next(outs) if word == "OUT" else words.get(word, word)) for word in argv]

    main(parse(*placed([*TINY.split(), "--output_dir", str(root / "start")])))
    return placed


# --------------------------------------------------------- probes: from flags to something that differs


def main(args):
    """The lines that a whole run prints."""
    with redirect_stdout(io.StringIO()) as printed:
        semi_main.main(args)
    return printed.getvalue()


def started(args):
    """The Run as it is before its first step."""
    with redirect_stdout(io.StringIO()):
        utils.seed_everything(args.seed)
        return semi_main.Run(args, CPU)


def described(words):
    """The line with these words that a run prints before its first step, None if there is none."""

    def probe(args):
        with redirect_stdout(io.StringIO()) as printed:
            if args.output_dir:
                Path(args.output_dir).mkdir()
            semi_main.Run(args, CPU).print_plan()
        return next((line for line in printed.getvalue().splitlines() if words in line), None)

    return probe


def log(figure):
    """figure(line) of each line of log.txt, after a whole run."""

    def probe(args):
        main(args)
        lines = Path(args.output_dir, "log.txt").read_text().splitlines()
        return [figure(json.loads(line)) for line in lines]

    return probe


epochs_logged = log(lambda line: line["epoch"])


def logs(key):
    """Whether each line of log.txt has this key."""
    return log(lambda line: key in line)


def plan(labelled, unlabelled, steps=1):
    return (
        f"semi-supervised: {labelled} + {unlabelled} images a process and step, "
        f"{labelled + unlabelled} in all on 1 process(es); {steps} steps an epoch"
    )


def files(args):
    """Names of the files a whole run leaves in the folders that are its own."""
    main(args)
    folder = Path(args.output_dir)
    return {path.name for path in folder.iterdir()} - {"best.pth"} if args.output_dir else set()


def in_the_way(args):
    """What a run says of a folder that holds another."""
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    Path(args.output_dir, "checkpoint.pth").touch()
    words = refusal(lambda args: (main(args), "no error")[1])(args)
    return words.split(":")[0].replace(args.output_dir, "OUT")


def in_checkpoint(key):
    def probe(args):
        main(args)
        return key in checkpoint.read(Path(args.output_dir, "checkpoint.pth"))

    return probe


def refusal(call):
    """call(args), or the words with which it refuses."""

    def probe(args):
        try:
            return call(args)
        except (ValueError, OSError) as error:
            return str(error)

    return probe


labelled_images = refusal(lambda args: len(started(args).labelled))


def sevens(name, num_classes=2, **settings):
    """A state dict of the network in which every number is 7."""
    weights = timm.create_model(name, num_classes=num_classes, **settings).state_dict()
    return {key: torch.full_like(value, 7) for key, value in weights.items()}


def from_file(args):
    """How many tensors of the network are sevens before the first step, or why there are none."""
    words = refusal(started)(args)
    if isinstance(words, str):
        return re.sub(r"\S+\.pth", "FILE", words)
    return sum(bool((value == 7).all()) for value in words.state.model.state_dict().values())


def from_hub(args):
    """The same, where timm hosts sevens of 1,000 classes."""
    with patch("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: sevens("resnet10t", 1000)):
        return from_file(args)


class Toy(nn.Module):
    """A matrix, a bias, and a matrix that names itself undecayed."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.token = nn.Parameter(torch.ones(2, 2))

    def no_weight_decay(self):
        return {"token"}


def optimizer(figure):
    return lambda args: figure(optimization.build_optimizer(args, Toy()))


def decays(optimizer):
    return sorted((group["weight_decay"], len(group["params"])) for group in optimizer.param_groups)


def layers(args):
    """The scales of the learning rates in a network of two blocks, the highest three."""
    model = build_model(args.model, 2, args.input_size, depth=2)
    groups = optimization.build_optimizer(args, model).param_groups
    return sorted({group.get("lr_scale", "none") for group in groups})[-3:]


def rates(args):
    return [float(f"{rate:.6g}") for rate in optimization.learning_rates(args)]


def stays_near_one(args):
    return all(0.99 <= rate <= 1.01 for rate in rates(args))


def stuck_rates(args):
    """The learning rate of each epoch where the accuracy never improves."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.lr)
    scheduler, seen = optimization.build_scheduler(args, optimizer), []
    for epoch in range(args.epochs):
        seen.append(float(f"{optimizer.param_groups[0]['lr']:.6g}"))
        scheduler.step(epoch, metric=1.0)
    return seen


def network(figure):
    def probe(args):
        with torch.device("meta"):
            return figure(semi_main._network(args, 2, torch.device("meta")))

    return probe


buildable = refusal(network(lambda model: "built"))


def rates_of(kind, name):
    return lambda model: [round(getattr(m, name), 4) for m in model.modules() if isinstance(m, kind)]


def cnn_hears_transformer(args):
    """Whether the CNN's logits depend on the first transformer block."""
    model = semi_main._network(args, 2, CPU)
    model(torch.randn(2, 3, 32, 32))[0].sum().backward()
    return model.trans_1.mlp.fc1.weight.grad is not None


def sizes(args):
    """Side of a view of each kind and number of position embeddings."""
    image = Image.new("RGB", (32, 32))
    views = (*datasets._views(args)[1:], datasets.validation_view(args))
    with torch.device("meta"):
        positions = semi_main._network(args, 2, torch.device("meta")).pos_embed.shape[1]
    return [view(image).shape[-1] for view in views], positions


def transform(kind, figure=str):
    """figure(step) of the labelled and strong view's step of this kind, None if there is none."""

    def probe(args):
        steps = {type(step).__name__: step for step in datasets._views(args)[0].transforms}
        return figure(steps[kind]) if kind in steps else None

    return probe


def mixed(args):
    """What became of images of 0, 1, 2, 3: [smallest, largest] of each; None without mixing."""
    mixup = semi_main._mixup(args, 2)
    if mixup is None:
        return None
    np.random.seed(0)
    images, _ = mixup(torch.arange(4.0).view(4, 1, 1, 1).repeat(1, 3, 16, 16), torch.tensor([0, 0, 1, 1]))
    return [[round(float(x), 3) for x in (image.min(), image.max())] for image in images]


def blends(args):
    """How the four images were mixed: '=' not, '~' blended, '#' pasted."""
    images = mixed(args)
    return "".join("#" if low < high else "=" if low == i else "~" for i, (low, high) in enumerate(images))


def objective_of(args, features=None):
    """Objective over ln(4) / 2; without smoothing an image's loss is ln 4 (CNN) and 2 ln 4 (transformer)."""
    unsure = torch.tensor([1.0, 5, 5, 5]).log().repeat(3, 1)  # 1/16 for class 0
    logits, first = [torch.zeros(3, 4), unsure], torch.zeros(3, dtype=torch.int64)
    total, _ = objective(logits, first, logits, first, torch.ones(3), Recipe.from_args(args), features)
    return round(float(total) / math.log(4) * 2, 4)


WEAK, STRONG = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 0], [1.2, 1.6]])  # cosines 1 .6 / 0 .8


def consistency_of(args):
    return round(float(consistency([WEAK], [STRONG], Recipe.from_args(args))), 4)


def consistency_share(args):
    with_it, without = objective_of(args, ([WEAK], [STRONG])), objective_of(args)
    return round((with_it - without) * math.log(4) / 2, 4)


def pseudo_labels(args):
    """(classes, weights) of two images: the CNN says 0 at 0.8, the transformer 1 at 0.8 and 0.95."""
    recipe = Recipe.from_args(args)
    conv, trans = torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log(), torch.tensor([[0.2, 0.8], [0.05, 0.95]]).log()
    targets, weights = select_targets(conv, trans, recipe.policy, recipe.threshold, recipe.temperature)
    return targets.tolist(), weights.tolist()


def labeller(figure):
    """A figure of what makes the pseudo labels."""
    return lambda args: figure(started(args).state.labeller)


def teacher_is_the_average(args):
    """Whether the average of the weights labels the weak views."""
    run, seen = started(args), []
    with redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            semi_main, "train_one_epoch", lambda state, student, teacher, *_, **__: seen.append(teacher) or {}
        )
        patch.setattr(run, "_concentration", dict)
        run.train_epoch(0)
    return seen[0] is run.state.ema.module


def fairness_of(args):
    """What a fairness loss of 2 adds to the objective."""
    logits, recipe = [torch.zeros(2, 2)], started(args).recipe
    given = [logits, torch.tensor([0, 1]), logits, torch.tensor([0, 1]), torch.ones(2), recipe, None]
    return round((objective(*given, torch.tensor(2.0))[0] - objective(*given)[0]).item(), 6)


def labelled_view(args):
    """Which of the unlabelled images' views the labelled images have."""
    run = started(args)
    kinds = dict(zip(map(repr, run.unlabelled.transforms), ("strong", "weak")))
    return kinds[repr(run.labelled.transforms[0])]


def augmented_image(args):
    """The first image of the tree as the network gets it in epoch 0."""
    run = started(args)
    run.labelled.indices[:] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(semi_main, "train_one_epoch", lambda *inputs, **_: {"image": next(inputs[3])[0][0]})
        run.train_epoch(0)
        return run.state.pending["image"].tolist()


def with_a_broken_image(args):
    """What becomes of the first of four labelled images where it is unreadable."""
    views = started(args).labelled
    load = views.samples.source.load

    def broken(i):
        if i == views.indices[0]:
            raise UnreadableImage("It is broken.")
        return load(i)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views.samples.source, "load", broken)
        seen = refusal(lambda args: views[0][-1])(args)
    return "the second stands in" if seen == views.indices[1] else seen.split(" in ")[0]


def initial_weight(args):
    with redirect_stdout(io.StringIO()):
        run = semi_main.train(args, CPU)
    return next(run.state.model.parameters()).flatten()[0].item()


def block_runs(args):
    """How often a block of the network is run in train mode by a step: by the four layers, again in backward."""
    run, runs = started(args), []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        getattr(run.state.model, name)[0].register_forward_pre_hook(
            lambda m, _: runs.append(None) if m.training else None
        )
    with redirect_stdout(io.StringIO()):
        run.train_epoch(0)
    return len(runs)


def optimizer_steps(args):
    run, count = started(args), []
    run.state.optimizer.register_step_post_hook(lambda *_: count.append(None))
    with redirect_stdout(io.StringIO()):
        run.train_epoch(0)
    return len(count)


def first_rate(args):
    return started(args).state.optimizer.param_groups[0]["lr"]


def loaders(args):
    """(worker processes, pinned) of the labelled, the unlabelled and the evaluation loader on a GPU."""
    run, seen = started(args), []

    run.device = CUDA
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_loader", lambda _, plan, workers, pin, **__: seen.append((workers, pin)))
        for module in (loading, semi_main):
            patch.setattr(module, "read_batches", lambda _: ())
        for name in ("train_one_epoch", "evaluate_together"):
            patch.setattr(semi_main, name, lambda *_, **__: {})
        run.train_epoch(0)
        semi_main._evaluate(args, [run.state.model], run.validation, CUDA, run.autocast)
    return seen


def evaluation_batch(args):
    """Images of a batch of evaluation."""
    run, seen = started(args), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(semi_main, "evaluation_loader", lambda views, size, **_: seen.append(size))
        patch.setattr(semi_main, "read_batches", lambda _: None)
        patch.setattr(semi_main, "to_device", lambda *_: None)
        patch.setattr(semi_main, "evaluate_together", lambda *_, **__: None)
        semi_main._evaluate(args, [run.state.model], run.validation, CPU, run.autocast)
    return seen[0]


def triples(args):
    """Whether the first three labelled images are one image three times."""
    return len(set(list(started(args).labelled_order)[:3])) == 1


def average_after_a_step(args):
    """The EMA of a weight that was 1 at the start and is 0 after the first step."""
    run = started(args)
    before, after = (next(m.parameters()).data for m in (run.state.ema.module, run.state.model))
    before.fill_(1), after.fill_(0)
    run.state.ema.update(run.state.model)
    return round(before.flatten()[0].item(), 4)


def average_device(args):
    return semi_main._average(args, Toy()).device


def gradient_is_clipped(args):
    """Whether the norm of the last step's gradient is at most 0.001."""
    with redirect_stdout(io.StringIO()):
        run = semi_main.train(args, CPU)
    norms = [p.grad.norm() for p in run.state.model.parameters()]
    return torch.stack(norms).norm().item() <= 0.001 * 1.0001


@refusal
def precision_on_gpu(args):
    """The autocast type on a GPU with bf16, and whether gradients are scaled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        autocast, scaler, _ = optimization.mixed_precision(options.requested_amp(args), CUDA)
    return autocast.keywords["dtype"] if autocast.keywords["enabled"] else "off", scaler.is_enabled()


def algorithms(args):
    """Whether the network runs with deterministic algorithms alone."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
        patch.setattr(torch.backends.cudnn, "benchmark", True)
        patch.setattr(torch.backends.cudnn, "deterministic", False)
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        patch.setattr("semi_main.train", lambda *_: found.append(torch.are_deterministic_algorithms_enabled()))
        try:
            main(args)
        finally:
            torch.use_deterministic_algorithms(False)
        assert found[0] == bool(os.environ["CUBLAS_WORKSPACE_CONFIG"]) == torch.backends.cudnn.deterministic
    return found[0]


def joined(world=1):
    """(backend, address, processes) of the process group among so many, or the device of a lone process."""

    @refusal
    def probe(args):
        groups = []
        with pytest.MonkeyPatch.context() as patch:
            for name in LAUNCHER:
                patch.delenv(name, raising=False)
            if world > 1:
                for name, value in (("RANK", 0), ("WORLD_SIZE", world), ("LOCAL_RANK", 0)):
                    patch.setenv(name, str(value))
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setattr(torch.distributed, "init_process_group", lambda *a, **k: groups.append((*a, k)))
            device = utils.init_distributed(args.device, args.dist_url, args.world_size, args.use_submitit)
        return [(g[0], g[-1]["init_method"], g[-1]["world_size"]) for g in groups] or str(device)

    return probe


# --------------------------------------------------------- the table


@dataclass(frozen=True)
class Row:
    """`given` + flag + `a` and `given` + flag + `b` differ in probe(args); None: without the flag.

    `expect` holds both results where they are known beforehand. A list is taken as it is, a string split.
    """

    what: str  # one of KINDS
    a: Any
    b: Any
    probe: Any
    expect: Any = None
    given: str = ""


def counts(labelled, unlabelled, validation):
    return f"{labelled} labelled, {unlabelled} unlabelled, {validation} validation images"


OTHERS = TINY + " --data-path SETS --data-split-file None"
NO_RATIO = "--select-ratio 0.5 means nothing to --data-set IMNET: leave it out."
NO_JPEG = "--data-backend fast means nothing to --data-set CIFAR10: leave it out."
NO_LISTS = "--data-set SEMI-PLACES205 needs --split-folder, the folder of semi_ltrain.txt."
DEIT = "--model deit_tiny_patch16_224 --drop-path 0"
TWO = "--model Semiformer_micro_patch16 --input-size 32 --drop-path 0"
TEN = "--model resnet10t"
RESNET, SEMIFORMER = (len(sevens(name)) for name in ("resnet10t", "Semiformer_micro_patch16"))


def start_rows(name, file, taken, given=""):
    """Rows of a --*-load and of its file: each alone is refused, both load so many tensors."""
    flag, given = f"--{name}-load", f"{TINY} {given}"
    lonely = f"{flag}-file FILE is read with {flag} only: add {flag}, or leave the file out."
    wanting = f"{flag} needs a file: add {flag}-file FILE."
    return {
        flag: Row("network", None, "", from_file, (lonely, taken), f"{given} {flag}-file {file}"),
        f"{flag}-file": Row("network", "None", file, from_file, (wanting, taken), f"{given} {flag}"),
    }


NO_WARMUP = "--epochs 4 --warmup-epochs 0 --lr 1 --min-lr 0"
STEP = "--sched step --warmup-epochs 0 --lr 1"
PLATEAU = (
    "--sched plateau --warmup-epochs 0 --warmup-lr 1 --lr 1 --min-lr 0 --decay-rate 0.1 --epochs 8 "
    "--patience-epochs 1 --cooldown-epochs 0"
)
NOISE = "--sched step --warmup-epochs 0 --lr 1 --epochs 9 --lr-noise 0"
NO_AA = ["--aa", ""]

FLAGS = {
    # length and pace
    "--batch-size": Row("printed line", "4", "6", described("semi-supervised"), (plan(2, 2), plan(3, 3)), TINY),
    "--epochs": Row("file", "1", "2", epochs_logged, ([0], [0, 1]), SAVED),
    "--accum-iter": Row("step", "1", "3", optimizer_steps, (4, 2), TINY + " --steps-per-epoch 4"),
    "--steps-per-epoch": Row(
        "printed line", "0", "7", described("semi-supervised"), (plan(2, 2, steps=2), plan(2, 2, steps=7)), TINY
    ),
    "--start_epoch": Row("file", "0", "1", epochs_logged, ([0, 1], [1]), SAVED + " --epochs 2"),
    "--evaluate-freq": Row("file", "1", "2", epochs_logged, ([0, 1, 2, 3], [0, 2, 3]), SAVED + " --epochs 4"),
    "--eval": Row(
        "file",
        None,
        "",
        files,
        (OF_A_RUN, {"eval.json", *REPORT}),
        SAVED + " --resume CHECKPOINT --epochs 2",
    ),
    "--seed": Row("order", "0", "1", lambda args: list(started(args).labelled_order), None, TINY),
    # network
    "--model": Row(
        "network",
        "resnet18",
        "deit_tiny_patch16_224",
        network(lambda m: type(m).__name__),
        ("ResNet", "VisionTransformer"),
    ),
    "--input-size": Row("network", "32", "64", sizes, (([32, 32, 32], 5), ([64, 64, 64], 17)), DEIT),
    "--drop": Row(
        "network", "0", "0.3", network(rates_of(nn.Dropout, "p")), ([0.0] * 12, [0.0, 0.3, 0.3, 0.3] * 3), TWO
    ),  # attention's own probabilities have none
    "--drop-path": Row(
        "network",
        "0",
        "0.5",
        network(rates_of(DropPath, "drop_prob")),
        ([], [0.25, 0.25, 0.5, 0.5]),
        TWO,
    ),
    "--drop-block": Row(
        "network",
        None,
        "0.25",
        network(rates_of(DropBlock2d, "drop_prob")),
        ([], [0.25] * 4),
        "--model resnet18 --drop-path 0",
    ),
    "--remove-fcu": Row("network", None, "", cnn_hears_transformer, (True, False), TWO),
    # data
    "--data-path": Row(
        "printed line",
        "TREE",
        "TREE3",
        described("validation"),
        ("8 labelled, 0 unlabelled, 4 validation images", "12 labelled, 0 unlabelled, 6 validation images"),
        TINY + " --data-set IMNET",
    ),
    "--data-set": Row(
        "printed line",
        "IMNET",
        "SEMI-IMNET",
        described("validation"),
        ("8 labelled, 0 unlabelled, 4 validation images", "4 labelled, 8 unlabelled, 4 validation images"),
        TINY,
    ),
    "--inat-category": Row(
        "data",
        "name",
        "kingdom",
        lambda args: started(args).validation.samples.classes,
        (("Acer rubrum", "Bufo bufo", "Bufo viridis"), ("Plantae", "Animalia")),
        OTHERS + " --data-set INAT",
    ),
    "--data-split-file": Row("data", "None", "LIST", lambda args: len(started(args).labelled), (8, 4), TINY),
    "--split-folder": Row(
        "data", "None", "LISTS", labelled_images, (NO_LISTS, 4), OTHERS + " --data-set SEMI-PLACES205"
    ),
    "--select-ratio": Row(
        "data", "1", "0.5", lambda args: started(args).labelled.indices.tolist(), ([0, 1, 4, 5], [4, 5, 6, 7]), TINY
    ),
    "--unlabelled-path": Row("data", [""], "TREE3", lambda args: len(started(args).unlabelled), (8, 18), TINY),
    "--max-bad-images": Row(
        "data", "0", "0.25", with_a_broken_image, ("At least 1 of 4 images", "the second stands in"), TINY
    ),
    "--data-backend": Row(
        "loader", "pil", "fast", lambda args: started(args).labelled[0][0].dtype, (torch.float32, torch.uint8), TINY
    ),
    "--unlabelDataset_exclude_labeledData": Row(
        "data",
        None,
        "",
        lambda args: started(args).unlabelled.indices.tolist(),
        ([0, 1, 2, 3, 4, 5, 6, 7], [2, 3, 6, 7]),
        TINY,
    ),
    # semi-supervised objective
    "--supervise-only": Row("loss part", None, "", logs("train_loss_u"), ([True], [False]), SAVED),
    "--semi-start-epoch": Row(
        "loss part", "0", "1", logs("train_loss_u"), ([True, True], [False, True]), SAVED + " --epochs 2"
    ),
    "--mu": Row("printed line", "0.5", "0.25", described("semi-supervised"), (plan(2, 2), plan(1, 3)), TINY),
    "--pseudo-type": Row(
        "pseudo label", "cnn", "transformer", pseudo_labels, (([0, 0], [1.0, 1.0]), ([1, 1], [1.0, 1.0]))
    ),
    "--temperature": Row(
        "pseudo label",
        "1",
        "2",
        pseudo_labels,
        (([1, 1], [1.0, 1.0]), ([1, 1], [0.0, 1.0])),
        "--pseudo-type transformer",
    ),
    "--threshold": Row(
        "pseudo label",
        "0.7",
        "0.9",
        pseudo_labels,
        (([1, 1], [1.0, 1.0]), ([1, 1], [0.0, 1.0])),
        "--pseudo-type transformer",
    ),
    "--teacher": Row("step", "student", "ema", teacher_is_the_average, (False, True), TINY),
    "--confidence": Row("pseudo label", "fixed", "free", labeller(lambda x: x.rule), ("fixed", "free"), TINY),
    "--align": Row("pseudo label", "none", "shares", labeller(lambda x: len(x.alignments)), (0, 1), TINY),
    "--confidence-momentum": Row(
        "pseudo label",
        "0.999",
        "0.9",
        labeller(lambda x: x.rules[0].momentum),
        (0.999, 0.9),
        TINY + " --confidence soft",
    ),
    "--fairness-lambda": Row("loss part", "0", "0.01", fairness_of, (0, 0.02), TINY + " --confidence free"),
    "--pseudo-mixup": Row("mixing", None, "", lambda args: started(args).recipe.pseudo_mixup, (False, True), TINY),
    "--semi-lambda": Row("loss part", "10", "4", objective_of, (33, 15), "--smoothing 0"),
    "--unlabel-smooth": Row("loss part", None, "", objective_of, (32.6517, 29.1688), "--smoothing 0.4"),
    "--mask-cnn-ratio": Row("loss part", "1", "5", objective_of, (33, 37), "--smoothing 0"),
    "--mask-transformer-ratio": Row("loss part", "1", "5", objective_of, (33, 41), "--smoothing 0"),
    "--mask-cnn-ratio-u": Row("loss part", "1", "5", objective_of, (33, 73), "--smoothing 0"),
    "--mask-transformer-ratio-u": Row("loss part", "1", "5", objective_of, (33, 113), "--smoothing 0"),
    # consistency
    "--dual-consistency": Row("loss part", None, "", logs("train_loss_consistency"), ([False], [True]), SAVED),
    "--consistency-start-epoch": Row(
        "loss part",
        "-1",
        "1",
        logs("train_loss_consistency"),
        ([True, True], [False, True]),
        SAVED + " --epochs 2 --dual-consistency",
    ),
    "--consistency-type": Row("loss part", "triplet", "infonce", consistency_of, (0.025, 0.4421)),
    "--consistency-lambda": Row("loss part", "0.5", "2", consistency_share, (0.0125, 0.05)),
    "--infonce-T": Row("loss part", "1", "0.1", consistency_of, (0.4421, 0.0092), "--consistency-type infonce"),
    "--margin": Row("loss part", "0.5", "1", consistency_of, (0.025, 0.2)),
    "--dis-type": Row("loss part", "cos", "l2", consistency_of, (0.025, 0.1069)),
    "--anchor-type": Row("loss part", "weak", "both", consistency_of, (0.025, 0.1)),
    # augmentation
    "--color-jitter": Row(
        "transform", "0.4", "0.2", transform("ColorJitter", lambda t: t.brightness), ((0.6, 1.4), (0.8, 1.2)), NO_AA
    ),
    "--aa": Row("transform", "rand-m9-mstd0.5-inc1", [""], transform("RandAugment", lambda t: len(t.ops)), (15, None)),
    "--smoothing": Row("loss part", "0", "0.4", objective_of, (3, 2.6517), "--semi-lambda 0"),
    "--train-interpolation": Row(
        "transform",
        "bicubic",
        "bilinear",
        transform("RandomResizedCropAndInterpolation", lambda t: str(t.interpolation).split(".")[-1].lower()),
        ("bicubic", "bilinear"),
    ),
    "--repeated-aug": Row("order", None, "", triples, (False, True), TINY + " --no-repeated-aug"),
    "--no-repeated-aug": Row("order", None, "", triples, (True, False), TINY),
    "--labelled-view": Row("transform", "strong", "weak", labelled_view, ("strong", "weak"), TINY),
    "--hflip": Row("transform", "0.5", "0", transform("RandomHorizontalFlip", lambda t: t.p), (0.5, None)),
    "--scale": Row(
        "transform",
        None,
        "0.7 1",
        transform("RandomResizedCropAndInterpolation", lambda t: t.scale),
        ((0.08, 1.0), (0.7, 1.0)),
    ),
    "--reprob": Row("transform", "0.25", "0", transform("RandomErasing", lambda t: t.probability), (0.25, None)),
    "--remode": Row("transform", "pixel", "const", transform("RandomErasing", lambda t: t.mode), ("pixel", "const")),
    "--recount": Row("transform", "1", "3", transform("RandomErasing", lambda t: t.max_count), (1, 3)),
    # mixup
    "--mixup": Row("mixing", "0", "0.8", mixed, None, "--cutmix 0"),
    "--cutmix": Row("mixing", "0", "1", blends, None, "--mixup 0.8 --mixup-switch-prob 1"),
    "--cutmix-minmax": Row("mixing", None, "0.4 0.6", blends, None, "--mixup 0.8 --cutmix 0 --mixup-switch-prob 1"),
    "--mixup-prob": Row("mixing", "1", "0", blends, ("~~~~", "====")),
    "--mixup-switch-prob": Row("mixing", "0", "1", blends, ("~~~~", "####")),
    "--mixup-mode": Row("mixing", "batch", "elem", mixed, None, "--mixup-switch-prob 0"),
    # optimizer
    "--opt": Row("parameter group", "adamw", "sgd", optimizer(lambda o: type(o).__name__), ("AdamW", "SGD")),
    "--opt-eps": Row("parameter group", "1e-8", "1e-4", optimizer(lambda o: o.defaults["eps"]), (1e-8, 1e-4)),
    "--opt-betas": Row(
        "parameter group", None, "0.8 0.9", optimizer(lambda o: tuple(o.defaults["betas"])), ((0.9, 0.999), (0.8, 0.9))
    ),
    "--clip-grad": Row("step", None, "0.001", gradient_is_clipped, (False, True), TINY),
    "--momentum": Row(
        "parameter group", "0.9", "0.5", optimizer(lambda o: o.defaults["momentum"]), (0.9, 0.5), "--opt sgd"
    ),
    "--weight-decay": Row(
        "parameter group", "0.05", "0.3", optimizer(decays), ([(0.0, 2), (0.05, 1)], [(0.0, 2), (0.3, 1)])
    ),
    "--layer-decay": Row("parameter group", "1", "0.5", layers, (["none"], [0.25, 0.5, 1]), DEIT + " --input-size 32"),
    # schedule
    "--sched-on-updates": Row(
        "schedule", None, "", rates, ([1, 1, 0.853553, 0.5], [1, 0.853553, 0.5, 0.146447]), NO_WARMUP
    ),
    "--sched": Row(
        "schedule", "cosine", "step", rates, ([1, 1, 0.853553, 0.5], [1, 1, 1, 0.1]), NO_WARMUP + " --decay-epochs 2"
    ),
    "--lr": Row("schedule", "1", "2", rates, ([1, 1, 0.853553, 0.5], [2, 2, 1.70711, 1]), NO_WARMUP),
    "--warmup-lr": Row(
        "schedule", "0", "0.5", rates, ([0, 0, 0.5, 0.5], [0.5, 0.5, 0.75, 0.5]), NO_WARMUP + " --warmup-epochs 2"
    ),
    "--min-lr": Row("schedule", "0", "0.5", rates, ([1, 1, 0.853553, 0.5], [1, 1, 0.926777, 0.75]), NO_WARMUP),
    "--warmup-epochs": Row(
        "schedule", "0", "2", rates, ([1, 1, 0.853553, 0.5], [0, 0, 0.5, 0.5]), NO_WARMUP + " --warmup-lr 0"
    ),
    "--cooldown-epochs": Row(
        "schedule",
        "0",
        "2",
        stuck_rates,
        ([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01], [1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1]),
        PLATEAU,
    ),
    "--patience-epochs": Row(
        "schedule", "1", "2", stuck_rates, ([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01], [1, 1, 1, 1, 1, 0.1, 0.1, 0.1]), PLATEAU
    ),
    "--decay-epochs": Row("schedule", "1", "2", rates, ([1, 1, 0.1, 0.01], [1, 1, 1, 0.1]), STEP + " --epochs 4"),
    "--decay-rate": Row(
        "schedule", "0.1", "0.5", rates, ([1, 1, 0.1], [1, 1, 0.5]), STEP + " --epochs 3 --decay-epochs 1"
    ),
    "--dr": Row("schedule", "0.1", "0.5", rates, ([1, 1, 0.1], [1, 1, 0.5]), STEP + " --epochs 3 --decay-epochs 1"),
    "--lr-noise": Row(
        "schedule",
        None,
        "0.5",
        lambda args: [rate == 1 for rate in rates(args)],
        ([True] * 4, [True, True, True, False]),
        STEP + " --epochs 4",
    ),
    "--lr-noise-pct": Row("schedule", "0.67", "0.01", stays_near_one, (False, True), NOISE),
    "--lr-noise-std": Row("schedule", "1", "1e-6", stays_near_one, (False, True), NOISE),
    # moving average
    "--model-ema": Row("file", None, "", in_checkpoint("model_ema"), (False, True), SAVED + " --no-model-ema"),
    "--no-model-ema": Row("file", None, "", in_checkpoint("model_ema"), (True, False), SAVED),
    "--model-ema-decay": Row("step", "0.5", "0.25", average_after_a_step, (0.5, 0.25), TINY),
    "--model-ema-force-cpu": Row("step", None, "", average_device, (None, "cpu")),
    # files
    "--output_dir": Row("file", [""], "OUT", files, (set(), OF_A_RUN), TINY),
    "--tensorboard": Row("file", None, "", lambda args: "tensorboard" in files(args), (False, True), SAVED),
    "--resume": Row("file", [""], "CHECKPOINT", lambda args: started(args).state.epoch, (-1, 0), TINY),
    "--overwrite": Row("error", None, "", in_the_way, ("OUT holds another run", "no error"), SAVED),
    "--pretrained": Row("network", None, "", from_hub, (0, RESNET - 2), f"{TINY} {TEN}"),
    "--finetune": Row("network", [""], "RESNET", from_file, (0, RESNET), f"{TINY} {TEN}"),
    **start_rows("dino", "VIT", 39, TWO),
    **start_rows("semiformer", "SEMIFORMER", SEMIFORMER - 4, TWO),
    **start_rows("resnet", "RESNET", RESNET - 2, TEN),
    **start_rows("warmup-model", "RESNET", RESNET, TEN),
    # device, precision, loading
    "--device": Row(
        "error",
        "cpu",
        "cuda",
        joined(),
        ("cpu", "--device cuda, but PyTorch sees no CUDA GPU here: pass --device cpu."),
    ),
    "--amp": Row("precision", "bf16", "fp16", precision_on_gpu, ((torch.bfloat16, False), (torch.float16, True))),
    "--compile": Row(
        "network", None, "", lambda args: started(args).state.model._compiled_call_impl is not None, (False, True), TINY
    ),
    "--deterministic": Row("network", None, "", algorithms, (False, True)),
    "--grad-checkpointing": Row("step", None, "", block_runs, (4, 8), f"{TINY} {TEN}"),
    "--no-amp": Row("precision", None, "", precision_on_gpu, ((torch.bfloat16, False), ("off", False))),
    "--use-native-amp": Row(
        "precision",
        None,
        "",
        precision_on_gpu,
        (("off", False), "--use-native-amp and --amp off disagree: keep one of them"),
        "--amp off",
    ),
    "--num_workers": Row("loader", "0", "2", loaders, ([(0, True)] * 3, [(1, True), (1, True), (2, True)]), TINY),
    "--pin-mem": Row("loader", None, "", loaders, ([(0, False)] * 3, [(0, True)] * 3), TINY + " --no-pin-mem"),
    "--no-pin-mem": Row("loader", None, "", loaders, ([(0, True)] * 3, [(0, False)] * 3), TINY),
    # process group
    "--world_size": Row(
        "process group",
        "1",
        "3",
        joined(2),
        ([("gloo", "env://", 2)], "--world_size 3, but the launcher started 2: use torchrun --nproc_per_node."),
        "--device cpu",
    ),
    "--dist_url": Row(
        "process group",
        "env://",
        "tcp://host:1",
        joined(2),
        ([("gloo", "env://", 2)], [("gloo", "tcp://host:1", 2)]),
        "--device cpu",
    ),
    "--use_submitit": Row(
        "process group",
        "false",
        "true",
        joined(),
        ("cpu", "--use_submitit true needs Slurm's environment: start with run_with_submitit.py, or pass false."),
        "--device cpu",
    ),
}

# Second effects, and the values that are refused.
MORE = [
    *[
        ("--data-set", Row("printed line", a, b, described("validation"), expect, OTHERS + given))
        for a, b, given, expect in (
            ("CIFAR10", "CIFAR100", "", (counts(20, 20, 4), counts(25, 25, 6))),
            ("CIFAR10", "FASHION", "", (counts(20, 20, 4), counts(40, 40, 6))),
            ("SEMI-INAT", "INAT", "", (counts(2, 3, 3), counts(4, 0, 3))),
            ("INAT", "INAT19", "", (counts(4, 0, 3), counts(3, 0, 1))),
            ("SEMI-PLACES205", "5PER-SEMI-PLACES205", " --split-folder LISTS", (counts(4, 6, 2), counts(3, 6, 2))),
            ("5PER-SEMI-PLACES205", "1PER-SEMI-PLACES205", " --split-folder LISTS", (counts(3, 6, 2), counts(2, 6, 2))),
        )
    ],
    (
        "--select-ratio",
        Row("data", "1", "0.3", labelled_images, (20, 6), OTHERS + " --data-set CIFAR10"),
    ),
    (
        "--select-ratio",
        Row("error", "1", "0.5", labelled_images, (8, NO_RATIO), TINY + " --data-set IMNET"),
    ),
    (
        "--data-backend",
        Row("error", "pil", "fast", labelled_images, (20, NO_JPEG), OTHERS + " --data-set CIFAR10"),
    ),
    ("--unlabelled-path", Row("data", [""], "LIST3", lambda args: len(started(args).unlabelled), (8, 2), TINY)),
    (
        "--resume",
        Row(
            "error",
            "none.pth",
            "http://127.0.0.1:9/none.pth",
            lambda args: refusal(started)(args).split(" (")[0],
            ("There is no checkpoint none.pth.", "Cannot download http://127.0.0.1:9/none.pth"),
            TINY,
        ),
    ),
    (
        "--resume",
        Row(
            "printed line", [""], "CHECKPOINT", lambda args: "Nothing left to train" in main(args), (False, True), TINY
        ),
    ),
    (
        "--model",
        Row(
            "error",
            "deit_tiny_patch16_224",
            "Semiformer_smal_patch16",
            buildable,
            (
                "built",
                "Unknown --model 'Semiformer_smal_patch16': did you mean Semiformer_small_patch16, "
                "Semiformer_PE_small_patch16, Semiformer_micro_patch16?",
            ),
        ),
    ),
    (
        "--drop-block",
        Row(
            "error",
            None,
            "0.1",
            buildable,
            ("built", "--drop-block does not apply to the two-stream network Semiformer_micro_patch16: leave it out."),
            TWO,
        ),
    ),
    (
        "--remove-fcu",
        Row(
            "error",
            None,
            "",
            buildable,
            ("built", "--remove-fcu removes the fusion of a two-stream network, and resnet18 has none."),
            "--model resnet18",
        ),
    ),
    ("--drop", Row("network", "0", "0.3", network(lambda m: m.drop_rate), (0, 0.3), "--model resnet18")),
    (
        "--output_dir",
        Row(
            "printed line",
            [""],
            "OUT",
            described("nothing of this run is saved"),
            ("No --output_dir: nothing of this run is saved.", None),
            TINY,
        ),
    ),
    (
        "--semi-start-epoch",
        Row(
            "file", "0", "1", lambda args: "epoch_0_checkpoint.pth" in files(args), (False, True), SAVED + " --epochs 2"
        ),
    ),
    (
        "--consistency-start-epoch",
        Row(
            "file",
            "-1",
            "1",
            lambda args: "epoch_0_checkpoint.pth" in files(args),
            (False, True),
            SAVED + " --epochs 2 --dual-consistency",
        ),
    ),
    (
        "--lr",
        Row("file", "0.1", "0.2", log(lambda line: line["train_lr"]), ([0.1], [0.2]), SAVED + " --warmup-epochs 0"),
    ),
    (
        "--sched",
        Row(
            "file",
            "cosine",
            "plateau",
            log(lambda line: round(line["train_lr"], 6)),
            ([0.1, 0.1, 0.075002], [0.1, 0.1, 0.1]),
            SAVED + " --epochs 3 --warmup-epochs 0 --lr 0.1",
        ),
    ),
    ("--opt", Row("parameter group", "sgd", "momentum", optimizer(lambda o: o.defaults["nesterov"]), (True, False))),
    ("--batch-size", Row("loader", "4", "6", evaluation_batch, (12, 18), TINY)),
    ("--seed", Row("transform", "0", "1", augmented_image, None, TINY)),
    ("--seed", Row("network", "0", "1", initial_weight, None, TINY + " --start_epoch 1")),
    ("--seed", Row("schedule", "0", "1", rates, None, NOISE)),
    (
        "--start_epoch",
        Row("schedule", "0", "2", first_rate, (0, 0.5), TINY + " --epochs 4 --lr 1 --warmup-lr 0 --warmup-epochs 2"),
    ),
    ("--aa", Row("error", "rand-m9", "nonsense", refusal(transform("RandAugment", lambda t: "built")), None)),
    ("--cutmix", Row("mixing", "0", "1", mixed, None, "--mixup 0")),
    ("--cutmix-minmax", Row("mixing", None, "0.4 0.6", mixed, None, "--mixup 0 --cutmix 0")),
    ("--mixup-mode", Row("mixing", "batch", "pair", mixed, None, "--mixup-switch-prob 0")),
    ("--anchor-type", Row("loss part", "weak", "strong", consistency_of, (0.025, 0.075))),
    (
        "--consistency-lambda",
        Row("file", "0", "9", log(lambda line: line["train_loss"]), None, SAVED + " --dual-consistency"),
    ),
]


def argv(flag, row, value):
    given, value = (x.split() if isinstance(x, str) else x for x in (row.given, value))
    return given if value is None else [*given, flag, *value]


def check_row(flag, row, places):
    results = [row.probe(parse(*places(argv(flag, row, value)))) for value in (row.a, row.b)]
    assert results[0] != results[1]
    if row.expect is not None:
        assert results == list(row.expect)


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")
@pytest.mark.parametrize("flag", FLAGS)
def test_flag_changes_what_the_table_says(flag, places):
    check_row(flag, FLAGS[flag], places)


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated:FutureWarning")
@pytest.mark.parametrize("flag, row", MORE, ids=[f"{flag}: {row.what}" for flag, row in MORE])
def test_flag_changes_this_too(flag, row, places):
    check_row(flag, row, places)


def test_every_flag_has_a_row():
    flags = [flag for action in options.get_args_parser()._actions for flag in action.option_strings]
    assert sorted(FLAGS) == sorted(set(flags) - set(NO_EFFECT))
    assert set(NO_EFFECT) <= set(flags)


def test_every_row_says_what_kind_of_thing_changes():
    assert {row.what for row in [*FLAGS.values(), *(row for _, row in MORE)]} == KINDS


@pytest.mark.parametrize("flag", NO_EFFECT)
def test_flag_without_effect_is_refused(flag, capsys):
    with pytest.raises(SystemExit):
        parse(flag, "O1") if flag == "--opt-level" else parse(flag)
    assert f"{flag} had no effect in the published code" in capsys.readouterr().err


def test_device_is_the_gpu_where_there_is_one(monkeypatch):
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert parse().device == device
