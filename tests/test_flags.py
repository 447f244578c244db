"""What every flag changes, shown: a row a flag, two command lines that differ in it alone, two results."""

import io
import json
import math
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import DropBlock2d, DropPath
from torch import nn

import datasets
import options
import semi_main
import utils
from losses import Recipe, consistency, objective
from pseudo_labels import select_targets

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NO_EFFECT = ("--opt-level", "--cross-attn", "--cnn2trans", "--trans2cnn", "--resplit")
KINDS = {"parameter group", "network", "transform", "mixing", "loss part", "pseudo label", "schedule", "order", "data",
         "loader", "step", "file", "printed line", "precision", "process group", "error"}  # fmt: skip
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
# One quick step of one quick epoch on the tiny tree: 2 of 4 labelled and 2 of 8 unlabelled images.
TINY = ("--data-set SEMI-IMNET --data-path TREE --data-split-file LIST --model test_resnet --input-size 32 --drop-path 0 "
        "--batch-size 4 --mu 0.5 --epochs 1 --steps-per-epoch 1 --num_workers 0 --mixup 0 --cutmix 0 --device cpu")  # fmt: skip
SAVED = TINY + " --output_dir OUT"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_tree(root, classes):
    """train/ of 4 and val/ of 2 images a class; the names of half of the train images."""
    rng, labelled = np.random.default_rng(0), []
    for part, n in (("train", 4), ("val", 2)):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / part / name / f"{name}_{i}.png")
            labelled += [f"{name}_{i}.png" for i in range(2) if part == "train"]
    return labelled


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the capital words of the table stand for; each OUT is another folder."""
    root = tmp_path_factory.mktemp("flags")
    names = write_tree(root / "tree", ["cat", "dog"])
    write_tree(root / "tree3", ["cat", "dog", "eel"])
    (root / "list.txt").write_text("\n".join(names) + "\n")
    words = {"TREE": root / "tree", "TREE3": root / "tree3", "LIST": root / "list.txt",
             "CHECKPOINT": root / "start" / "checkpoint.pth"}  # fmt: skip
    main(parse([str(words.get(word, word)) for word in TINY.split()] + ["--output_dir", str(root / "start")]))
    outs = iter(root / f"out{i}" for i in range(1000))
    return lambda argv: [str(next(outs) if word == "OUT" else words.get(word, word)) for word in argv]


def parse(argv):
    return options.get_args_parser().parse_args(argv)


# ------------------------------------------------------------------------- probes: from flags to something that differs


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


def described(start):
    """The printed line that starts so, of the plan of a run."""

    def probe(args):
        with redirect_stdout(io.StringIO()) as printed:
            semi_main.Run(args, CPU).describe()
        return next((line for line in printed.getvalue().splitlines() if line.startswith(start)), None)

    return probe


def log(figure):
    """figure(line) of each line of log.txt, after a whole run."""

    def probe(args):
        main(args)
        return [figure(json.loads(line)) for line in Path(args.output_dir, "log.txt").read_text().splitlines()]

    return probe


def epoch(line):
    return line["epoch"]


def files(args):
    main(args)
    return sorted(path.name for path in Path(args.output_dir).iterdir()) if args.output_dir else "nothing"


def in_checkpoint(key):
    def probe(args):
        main(args)
        return key in torch.load(Path(args.output_dir, "checkpoint.pth"), weights_only=False)

    return probe


def refusal(call):
    """call(args), or the words with which it refuses."""

    def probe(args):
        try:
            return call(args)
        except (ValueError, NotImplementedError) as error:
            return str(error)

    return probe


not_built = refusal(options.not_built)


def fake(**attributes):
    return pytest.MonkeyPatch.context(), attributes


class Toy(nn.Module):
    """A matrix, a bias, and a matrix that names itself undecayed."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.token = nn.Parameter(torch.ones(2, 2))

    def no_weight_decay(self):
        return {"token"}


def optimizer(figure):
    return lambda args: figure(semi_main.build_optimizer(args, Toy()))


def decays(optimizer):
    return sorted((group["weight_decay"], len(group["params"])) for group in optimizer.param_groups)


def rates(args):
    return [float(f"{rate:.6g}") for rate in semi_main.learning_rates(args)]


def stuck_rates(args):
    """The learning rate of each epoch where the accuracy never improves."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.lr)
    scheduler, seen = semi_main.build_scheduler(args, optimizer), []
    for epoch in range(args.epochs):
        seen.append(float(f"{optimizer.param_groups[0]['lr']:.6g}"))
        scheduler.step(epoch, metric=1.0)
    return seen


def network(figure):
    def probe(args):
        with torch.device("meta"):
            return figure(semi_main._network(args, 2))

    return probe


def rates_of(kind, name):
    return lambda model: [round(getattr(m, name), 4) for m in model.modules() if isinstance(m, kind)]


def cnn_hears_transformer(args):
    """Whether the CNN's logits depend on the first transformer block."""
    model = semi_main._network(args, 2)
    model(torch.randn(1, 3, 32, 32))[0].sum().backward()
    return model.trans_1.mlp.fc1.weight.grad is not None


def sizes(args):
    """Side of a view of each kind and number of position embeddings."""
    image = Image.new("RGB", (32, 32))
    views = (*datasets._views(args), datasets.eval_view(args.input_size))
    with torch.device("meta"):
        positions = semi_main._network(args, 2).pos_embed.shape[1]
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
    """The objective over ln(4) / 2, where a stream's own loss is ln 4 (CNN), 2 ln 4 (transformer) for each image."""
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


def epoch_inputs(args):
    """(settings of the train and the evaluation loader on a GPU, first labelled image) of epoch 0."""
    run, settings, loader = started(args), [], semi_main.training_loader

    def recorded(*args, num_workers, pin_memory, **kwargs):
        settings.append((num_workers, pin_memory))
        return loader(*args, num_workers=0, pin_memory=False, **kwargs) if kwargs else ()

    def first_image(state, student, teacher, labelled, *args, **kwargs):
        run.device = CPU
        return next(labelled)[0][0] if args_device == CPU else None

    args_device = CUDA if torch.device(args.device) != CPU else CPU
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(semi_main, "training_loader", recorded)
        patch.setattr(semi_main, "train_one_epoch", first_image)
        return settings, run.train_epoch(0)
