"""The command line: every flag with its meaning and unit, and the checks that read no data.

Flags keep their published names, types and defaults; tests/test_options.py freezes the set.
"""

import argparse
import difflib
import math
import os
import re
import sys

import torch
from PIL import Image

import confidence
import utils
from datasets import DATA_SETS
from images.transforms import train_view
from losses import Recipe
from models import check_hosted, check_name, has_two_streams
from pseudo_labels import POLICIES, policy_of
from utils import NOT_GIVEN, print_main


class Parser(argparse.ArgumentParser):
    """A parser that answers mistakes in two lines and remembers which flags were on the command line.

    A flag may be written with dashes or underscores (--output-dir for --output_dir), but not abbreviated. The parsed
    Namespace has the dest names of the flags that were on the command line as `given`, a sorted list.
    """

    def __init__(self, *args, **settings):
        # ours: the released parser takes --thresh for --threshold, as long as no other flag begins so.
        super().__init__(*args, allow_abbrev=False, **settings)

    def parse_args(self, args=None, namespace=None):
        """Parse as argparse does; exits with status 2 and two lines for wrong words."""
        words = self._as_declared(sys.argv[1:] if args is None else args)
        parsed = super().parse_args(words, namespace)
        # A default is not set where the Namespace has a value already, so what is no longer `absent` was given.
        absent = object()
        seen = super().parse_args(words, argparse.Namespace(**dict.fromkeys(vars(parsed), absent)))
        parsed.given = sorted(name for name, value in vars(seen).items() if value is not absent)
        return parsed

    def error(self, message):
        """Exit with status 2 and two lines: the message, and where the flags are explained."""
        self.exit(2, f"{self.prog}: error: {utils.printable(message)}\nsee {self.prog} --help\n")

    def _as_declared(self, words):
        """The words, each flag written as it is declared; exits for a flag that there is not."""
        declared = {flag.replace("_", "-"): flag for flag in self._option_string_actions}
        end = words.index("--") if "--" in words else len(words)
        return [*(self._flag_as_declared(word, declared) for word in words[:end]), *words[end:]]

    def _flag_as_declared(self, word, declared):
        name, equals, value = word.partition("=")
        flag = declared.get(name.replace("_", "-"))
        if not word.startswith("--") or " " in word and flag is None:  # argparse takes a word with a space for a value
            return word
        if flag is None:
            self.error(f"unrecognized flag {name}" + self._suggestion(name.replace("_", "-"), declared))
        return flag + equals + value

    def _suggestion(self, name, declared):
        shown = {
            plain: flag
            for plain, flag in declared.items()
            if self._option_string_actions[flag].help is not argparse.SUPPRESS
        }
        longer = [plain for plain in shown if plain.startswith(name)]
        close = longer[:3] or difflib.get_close_matches(name, shown, n=1, cutoff=0.7)
        return f": did you mean {', '.join(shown[plain] for plain in close)}?" if close else ""


class NoEffect(argparse.Action):
    """A published flag that the published code ignored: it is parsed, in order to be refused with an explanation."""

    def __call__(self, parser, namespace, values, option_string=None):
        flag = self.option_strings[0]
        parser.error(f"{flag} had no effect in the published code and does nothing here: leave it out")


def boolean(text):
    """Convert 'true' or 'false' of the command line to a bool (released code: any string was true)."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false: write true or false")
    return values[text.lower()]


def get_args_parser():
    """The parser of training and evaluation, a parent of the Slurm launcher's."""
    parser = Parser("Semiformer training and evaluation", add_help=False)
    for add_flags in (
        _run_flags,
        _network_flags,
        _data_flags,
        _semi_flags,
        _confidence_flags,
        _consistency_flags,
        _augmentation_flags,
        _mixup_flags,
        _optimizer_flags,
        _schedule_flags,
        _ema_flags,
        _checkpoint_flags,
        _hardware_flags,
        _distributed_flags,
        _no_effect_flags,
    ):
        add_flags(parser)
    return parser


def given(args):
    """Dest names of the flags on the command line, sorted; in a Namespace made by hand, those not at their default."""
    if hasattr(args, "given"):
        return args.given
    defaults = vars(recorded(get_args_parser().parse_args([])))
    return sorted(name for name, value in vars(args).items() if name in defaults and value != defaults[name])


def recorded(args):
    """The flags alone, as a Namespace for checkpoints and run.json: without `given`."""
    return argparse.Namespace(**{name: value for name, value in vars(args).items() if name != "given"})


def _group(parser, title):
    """The add_argument of a new group, which appends the default to every help text."""
    group = parser.add_argument_group(title)

    def add(*flags, help, **settings):
        group.add_argument(*flags, help=help + " (default: %(default)s)", **settings)

    return add


def _run_flags(parser):
    add = _group(parser, "length and pace of the run")
    add("--batch-size", default=64, type=int, help="images per process and step, labelled and unlabelled together")
    add(
        "--accum-iter",
        default=1,
        type=int,
        metavar="N",
        help="batches whose mean loss makes one optimizer step, as one batch N times as large would, but for "
        "BatchNorm: its statistics are those of each batch; an epoch's last step takes what is left",
    )
    add(
        "--epochs",
        default=300,
        type=int,
        help="length of the run in epochs; without --steps-per-epoch an epoch is one pass of the labelled loader",
    )
    add(
        "--steps-per-epoch",
        default=0,
        type=int,
        metavar="N",
        help="0: published, an epoch is one pass of the labelled loader; N > 0: every epoch has N steps, the "
        "labelled images reshuffled and repeated as needed",
    )
    add("--start_epoch", default=0, type=int, help="index of the first epoch, counted from 0")
    add(
        "--evaluate-freq",
        default=1,
        type=int,
        help="epochs between evaluations and log lines; checkpoint.pth comes every epoch",
    )
    add("--eval", action="store_true", help="evaluate top-1 and top-5 on the validation set and stop")
    add("--seed", default=0, type=int, help="seed of initial weights, order and augmentation")


def _network_flags(parser):
    add = _group(parser, "network")
    add("--model", default="deit_base_patch16_224", type=str, metavar="MODEL", help="name of the network to train")
    add("--input-size", default=224, type=int, help="side of the square input in pixels")
    add("--drop", type=float, default=0.0, metavar="PCT", help="dropout probability, 0 to 1")
    add(
        "--drop-path",
        type=float,
        default=0.1,
        metavar="PCT",
        help="stochastic depth probability of the last transformer block, 0 to 1; it grows linearly from 0 "
        "at the first",
    )
    add(
        "--drop-block",
        type=float,
        default=None,
        metavar="PCT",
        help="DropBlock probability, 0 to 1, of the networks that have it; None: off",
    )
    add("--remove-fcu", action="store_true", help="cut the exchange between the CNN and the transformer stream")


def _data_flags(parser):
    add = _group(parser, "data")
    add(
        "--data-path",
        default="/datasets01_101/imagenet_full_size/061417/",
        type=str,
        help="root folder of the data set; of your own images, train/ and val/ with a folder a class in each, or "
        "train.csv and val.csv of rows path,label",
    )
    add(
        "--data-set",
        default="IMNET",
        type=str,
        choices=list(DATA_SETS),
        help="data set; IMNET, INAT and INAT19 are labelled throughout and train supervised only",
    )
    add(
        "--inat-category",
        default="name",
        type=str,
        choices=["kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"],
        help="level of the taxonomy that makes the classes of INAT and INAT19",
    )
    add(
        "--data-split-file",
        default=NOT_GIVEN,
        type=str,
        help="file that names the labelled images of SEMI-IMNET, or their numbers in FASHION's train file, one a "
        "line; None: all images are labelled",
    )
    add(
        "--split-folder",
        default=NOT_GIVEN,
        type=str,
        help="folder of the lists of labelled, unlabelled and validation images of Places205",
    )
    add(
        "--select-ratio",
        default=1.0,
        type=float,
        help="share of the training images of SEMI-IMNET, CIFAR and FASHION that are labelled, above 0 and at most "
        "1; below 1 it overrides the --data-split-file of SEMI-IMNET",
    )
    add(
        "--unlabelled-path",
        default="",
        type=str,
        metavar="FOLDER_OR_CSV",
        help="images without classes, all below a folder or listed in a CSV file with paths relative to it: "
        "they are then the unlabelled set, instead of train/; empty: off",
    )
    add(
        "--max-bad-images",
        default=0.001,
        type=float,
        metavar="N",
        help="unreadable training images that others stand in for, at most: below 1 a share of the labelled and of "
        "the unlabelled list each, but 5 at least, else a number of images; 0: none",
    )
    add(
        "--data-backend",
        default="pil",
        choices=["pil", "fast"],
        help="pil: the published pixels; fast, of image files only: libjpeg-turbo, resizing on bytes (some levels of "
        "256 off), normalising and random erasing on the device",
    )
    add(
        "--unlabelDataset_exclude_labeledData",
        action="store_true",
        help="leave the labelled images out of the unlabelled set",
    )


def _semi_flags(parser):
    add = _group(parser, "semi-supervised objective")
    add("--supervise-only", action="store_true", help="train on the labelled images alone")
    add(
        "--semi-start-epoch",
        default=0,
        type=int,
        help="first epoch, counted from 0, with unlabelled images; before it a batch is all labelled",
    )
    add(
        "--mu",
        default=0.166666667,
        type=float,
        help="labelled / (labelled + unlabelled) images of a batch, above 0 and below 1",
    )
    add(
        "--pseudo-type",
        default="cnn",
        type=str,
        choices=list(POLICIES),
        help="policy that makes the pseudo label and its weight from both streams' logits of the weak view",
    )
    add(
        "--temperature",
        default=1.0,
        type=float,
        help="divisor of the weak logits before the softmax that makes the pseudo label",
    )
    add("--threshold", default=0.7, type=float, help="lowest probability, 0 to 1, at which a pseudo label counts")
    add("--semi-lambda", default=10.0, type=float, help="weight of the unlabelled loss; the labelled loss has 1")
    add("--unlabel-smooth", action="store_true", help="smooth the pseudo labels too, by --smoothing")
    add("--mask-cnn-ratio", default=1.0, type=float, help="weight of the CNN stream in the labelled loss")
    add(
        "--mask-transformer-ratio",
        default=1.0,
        type=float,
        help="weight of the transformer stream in the labelled loss",
    )
    add("--mask-cnn-ratio-u", default=1.0, type=float, help="weight of the CNN stream in the unlabelled loss")
    add(
        "--mask-transformer-ratio-u",
        default=1.0,
        type=float,
        help="weight of the transformer stream in the unlabelled loss",
    )


def _confidence_flags(parser):
    add = _group(parser, "teacher, confidence and mixing of the pseudo labels (after the paper)")
    add(
        "--teacher",
        default="student",
        choices=["student", "ema"],
        help="who labels the weak views: the network itself (published) or the EMA of its weights",
    )
    add(
        "--confidence",
        default="fixed",
        choices=list(confidence.RULES),
        help="when a pseudo label counts: fixed (published), --threshold; flex, FlexMatch; free, FreeMatch, which "
        "needs no --threshold; soft, SoftMatch, a weight instead; ada, AdaMatch, relative to the labelled images",
    )
    add(
        "--align",
        default="none",
        choices=["none", *confidence.TARGETS],
        help="distribution alignment of the pseudo labels, before --confidence: to equal shares, to the class shares "
        "of the labelled set, or to the mean prediction on labelled images",
    )
    add(
        "--confidence-momentum",
        type=float,
        default=0.999,
        metavar="M",
        help="share of the old value that the averages of --confidence and --align keep in a step",
    )
    add(
        "--fairness-lambda",
        type=float,
        default=0.0,
        metavar="L",
        help="weight of FreeMatch's fairness loss, with --confidence free; published: 0.01; 0: off",
    )
    add(
        "--pseudo-mixup",
        action="store_true",
        help="mix the strong views with each other by the probabilities of their pseudo labels (Semi-ViT)",
    )


def _consistency_flags(parser):
    add = _group(parser, "feature consistency of the weak and the strong view")
    add("--dual-consistency", action="store_true", help="add the consistency loss, summed over streams and anchors")
    add(
        "--consistency-start-epoch",
        default=-1,
        type=int,
        help="first epoch, counted from 0, with the consistency loss, never before --semi-start-epoch; -1: with it",
    )
    add("--consistency-type", default="triplet", choices=["triplet", "infonce"], help="which consistency loss")
    add("--consistency-lambda", default=0.5, type=float, help="weight of the consistency loss")
    add("--infonce-T", default=1.0, type=float, help="temperature: divisor of the cosines in the InfoNCE loss")
    add("--margin", default=0.5, type=float, help="margin of the triplet loss, in units of --dis-type")
    add(
        "--dis-type",
        default="cos",
        choices=["cos", "l2"],
        help="cosine similarity or Euclidean distance in the triplet loss",
    )
    add("--anchor-type", default="weak", choices=["weak", "strong", "both"], help="view that anchors the loss")


def _augmentation_flags(parser):
    add = _group(parser, "augmentation and label smoothing")
    add(
        "--color-jitter",
        type=float,
        default=0.4,
        metavar="PCT",
        help="strength of the colour jitter, a factor of 1 +- PCT; only without --aa",
    )
    add(
        "--aa",
        type=str,
        default="rand-m9-mstd0.5-inc1",
        metavar="NAME",
        help="AutoAugment or RandAugment policy in timm's notation; an empty string: none",
    )
    add("--smoothing", type=float, default=0.1, help="label smoothing of the labelled loss, 0 to 1")
    add(
        "--train-interpolation",
        type=str,
        default="bicubic",
        help="resampling of the labelled and strong views' crop: random, bilinear or bicubic",
    )
    add(
        "--repeated-aug",
        action="store_true",
        default=True,
        help="repeated augmentation: each labelled image three times in a row, dealt over the processes",
    )
    add(
        "--no-repeated-aug",
        action="store_false",
        dest="repeated_aug",
        help="each labelled image once a pass; the default shown is that of --repeated-aug",
    )
    add(
        "--labelled-view",
        choices=["strong", "weak"],
        default=None,
        help="view of the labelled images; None: the data set's own, weak for CIFAR and FASHION, strong for the others",
    )
    add("--hflip", type=float, default=0.5, metavar="P", help="probability of a horizontal flip in every training view")
    add(
        "--scale",
        type=float,
        nargs=2,
        default=[0.08, 1.0],
        metavar=("MIN", "MAX"),
        help="smallest and largest share of the image's area that the labelled and strong views' crop takes; not of "
        "CIFAR and FASHION, whose views crop by a few pixels",
    )
    add("--reprob", type=float, default=0.25, metavar="PCT", help="probability of random erasing, 0 to 1")
    add(
        "--remode",
        type=str,
        default="pixel",
        help="filling of an erased area: const (zero), rand (one normal colour) or pixel (normal noise)",
    )
    add("--recount", type=int, default=1, help="largest number of erased areas of an image")


def _mixup_flags(parser):
    add = _group(parser, "mixup and cutmix of the labelled images")
    add("--mixup", type=float, default=0.8, help="alpha of mixup's beta distribution; 0: no mixup")
    add("--cutmix", type=float, default=1.0, help="alpha of cutmix's beta distribution; 0: no cutmix")
    add(
        "--cutmix-minmax",
        type=float,
        nargs="+",
        default=None,
        help="smallest and largest side of the cutmix area as shares of the image's; replaces --cutmix's "
        "alpha; None: off",
    )
    add("--mixup-prob", type=float, default=1.0, help="probability that a batch is mixed, 0 to 1")
    add("--mixup-switch-prob", type=float, default=0.5, help="probability of cutmix where both are on, 0 to 1")
    add("--mixup-mode", type=str, default="batch", help="unit that draws its own mixing: batch, pair or elem")


def _optimizer_flags(parser):
    add = _group(parser, "optimizer")
    add("--opt", default="adamw", type=str, metavar="OPTIMIZER", help="optimizer by timm's name")
    add("--opt-eps", default=1e-8, type=float, metavar="EPSILON", help="epsilon of the optimizer")
    add(
        "--opt-betas", default=None, type=float, nargs="+", metavar="BETA", help="betas of the optimizer; None: its own"
    )
    add(
        "--clip-grad",
        type=float,
        default=None,
        metavar="NORM",
        help="largest L2 norm of the gradient; None: no clipping",
    )
    add("--momentum", type=float, default=0.9, metavar="M", help="momentum of SGD and its kin")
    add("--weight-decay", type=float, default=0.05, help="weight decay; biases and 1-d parameters have none")
    add(
        "--layer-decay",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="factor of the learning rate from each layer to the one before it, above 0 and at most 1; the head, and "
        "the norm before it, have the whole rate; 1: all layers have the same",
    )


def _schedule_flags(parser):
    add = _group(parser, "learning rate")
    add(
        "--sched",
        default="cosine",
        type=str,
        metavar="SCHEDULER",
        help="schedule, stepped once an epoch: cosine, tanh, step, poly or plateau (of top-1)",
    )
    add(
        "--sched-on-updates",
        action="store_true",
        help="set the rate of --sched cosine before every optimizer step, by the share of the epoch that is done, "
        "instead of once an epoch",
    )
    add("--lr", type=float, default=5e-4, metavar="LR", help="peak learning rate, absolute: not scaled by the batch")
    add("--warmup-lr", type=float, default=1e-6, metavar="LR", help="learning rate at which the warm-up starts")
    add("--min-lr", type=float, default=1e-5, metavar="LR", help="learning rate at which the schedule ends")
    add("--warmup-epochs", type=int, default=5, metavar="N", help="epochs of linear warm-up")
    add(
        "--cooldown-epochs",
        type=int,
        default=10,
        metavar="N",
        help="epochs the plateau schedule waits after a drop before it counts again",
    )
    add(
        "--patience-epochs",
        type=int,
        default=10,
        metavar="N",
        help="epochs without progress before the plateau schedule drops the rate",
    )
    add("--decay-epochs", type=float, default=30, metavar="N", help="epochs between drops of the step schedule")
    add("--decay-rate", "--dr", type=float, default=0.1, metavar="RATE", help="factor of one drop")
    add(
        "--lr-noise",
        type=float,
        nargs="+",
        default=None,
        metavar="SHARE",
        help="share of --epochs from which, or two between which, noise is added to the rate; None: off",
    )
    add("--lr-noise-pct", type=float, default=0.67, metavar="SHARE", help="largest noise as a share of the rate")
    add("--lr-noise-std", type=float, default=1.0, metavar="STD", help="standard deviation of the noise")


def _ema_flags(parser):
    add = _group(parser, "moving average of the weights (EMA)")
    add("--model-ema", action="store_true", default=True, help="keep an EMA of weights and buffers")
    add(
        "--no-model-ema",
        action="store_false",
        dest="model_ema",
        help="keep none; the default shown is that of --model-ema",
    )
    add("--model-ema-decay", type=float, default=0.99996, help="share of the old average kept in a step, 0 to 1")
    add("--model-ema-force-cpu", action="store_true", help="keep the average in main memory; a slow copy in every step")


def _checkpoint_flags(parser):
    add = _group(parser, "files: output, resume and initial weights")
    add("--output_dir", default="", help="folder of checkpoints and log.txt; empty: nothing is saved")
    add(
        "--tensorboard",
        action="store_true",
        help="write the curves of the run to OUTPUT_DIR/tensorboard; needs the package tensorboard",
    )
    add(
        "--resume",
        default="",
        help="checkpoint to go on from, a path or an https URL; auto: the newest complete one of --output_dir, if "
        "there is one; empty: a fresh start",
    )
    add(
        "--overwrite",
        action="store_true",
        help="start a new run in an --output_dir that holds another, whose files are moved into a folder below it",
    )
    add(
        "--pretrained",
        action="store_true",
        help="start from the weights that timm hosts for --model, which are downloaded once; a head of another "
        "number of classes is left out",
    )
    add(
        "--finetune",
        default="",
        help="checkpoint or encoder without a head (DINO, MAE) whose weights to start from, a path or an https URL; a "
        "head of another shape is left out, a position embedding resized; empty: none",
    )
    for name, what in (
        ("dino", "the transformer stream's weights from a bare ViT state dict"),
        ("semiformer", "everything but the heads from a checkpoint of the same network"),
        ("resnet", "everything but the last layer from a ResNet checkpoint"),
        ("warmup-model", "all weights, and no other state, from a checkpoint"),
    ):
        add(f"--{name}-load", action="store_true", help=f"load {what}, named by --{name}-load-file")
        add(f"--{name}-load-file", default=NOT_GIVEN, type=str, help=f"path that --{name}-load reads")


def _hardware_flags(parser):
    add = _group(parser, "device, precision and loading")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device to train on: cpu, cuda or cuda:N, the N-th GPU counted from 0; cuda where there is one, else cpu",
    )
    add(
        "--amp",
        default=None,
        choices=["auto", "off", "fp16", "bf16"],
        help="mixed precision: auto = bf16 where the GPU has it, else fp16 with a gradient scaler, off on a "
        "CPU; None: auto",
    )
    add(
        "--compile",
        action="store_true",
        help="compile the network with torch.compile: minutes at the start, faster steps, other rounding",
    )
    add(
        "--grad-checkpointing",
        action="store_true",
        help="compute activations again in backward instead of keeping them: less memory, slower steps",
    )
    add(
        "--deterministic",
        action="store_true",
        help="only deterministic algorithms on the GPU, so that a run repeats to the bit on GPUs of one type; slower",
    )
    add("--use-native-amp", action="store_true", help="the published name of --amp auto")
    add("--no-amp", action="store_true", help="the published name of --amp off")
    add(
        "--num_workers",
        default=10,
        type=int,
        help="data workers of a process, divided between labelled and unlabelled images; 0: load in the training "
        "process; without this flag at most as many as the process has cores",
    )
    add("--pin-mem", action="store_true", default=True, help="pin batches in host memory, for faster copies to the GPU")
    add("--no-pin-mem", action="store_false", dest="pin_mem", help="do not pin; the default shown is that of --pin-mem")


def _distributed_flags(parser):
    add = _group(parser, "process group")
    add("--world_size", default=1, type=int, help="number of processes, one a GPU; torchrun and Slurm set their own")
    add("--dist_url", default="env://", help="address at which the processes meet")
    add(
        "--use_submitit",
        default=False,
        type=boolean,
        metavar="{true,false}",
        help="processes are started by submitit: take rank and world size from Slurm's environment and "
        "refuse to start without it",
    )


def _no_effect_flags(parser):
    silent = {"action": NoEffect, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument("--opt-level", **silent)
    for flag in ("--cross-attn", "--cnn2trans", "--trans2cnn", "--resplit"):
        parser.add_argument(flag, nargs=0, **silent)


def requested_amp(args):
    """The precision that the flags ask for: 'auto', 'off', 'fp16' or 'bf16'. ValueError where they disagree."""
    asked = [("--use-native-amp", "auto")] if args.use_native_amp else []
    asked += [("--no-amp", "off")] if args.no_amp else []
    asked += [(f"--amp {args.amp}", args.amp)] if args.amp is not None else []
    for flag, precision in asked[1:]:
        if precision != asked[0][1]:
            raise ValueError(f"{asked[0][0]} and {flag} disagree: keep one of them")
    return asked[0][1] if asked else "auto"


def fit_workers(args):
    """The flags for this machine: --num_workers is, where it was not given, at most the cores of this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if "num_workers" in given(args) or args.num_workers <= cores:
        return args
    print_main(f"--num_workers {cores}, the cores of this process, instead of the default {args.num_workers}")
    return argparse.Namespace(**{**vars(args), "num_workers": cores})


def semi_supervised(args):
    """Whether any epoch may use unlabelled images."""
    return not args.supervise_only and not DATA_SETS[args.data_set].supervised_only


def print_notes(args):
    """Print a line where the run ends before a part of the method that its flags ask for begins."""
    if args.eval or not semi_supervised(args):
        return
    recipe, last = Recipe.from_args(args), args.epochs - 1
    if not recipe.is_semi(last):
        flag, value, lacking = "--semi-start-epoch", args.semi_start_epoch, "is semi-supervised"
    elif args.dual_consistency and not recipe.is_consistent(last):
        flag, value, lacking = "--consistency-start-epoch", args.consistency_start_epoch, "has the consistency loss"
    else:
        return
    print_main(f"Note: {flag} {value} is not below --epochs {args.epochs}, so no epoch of this run {lacking}.")


def labelled_and_unlabelled(args):
    """Images per process and step in the semi-supervised phase: (13, 95) for a batch of 108 and mu 0.125."""
    labelled = int(args.batch_size * args.mu)
    return labelled, args.batch_size - labelled


_NOT_OF_THE_RUN = {"resume", "output_dir", "overwrite"}


def changes(before, args):
    """{flag: [value before, value now]} of the flags of a run that differ from those of the checkpoint it resumes from.

    Args:
        before: {name: value}, `checkpoint.flags_in`. A flag that it lacks is newer than the file: its default counts.
    """
    changed = {}
    for action in get_args_parser()._actions:
        name = action.dest
        if name in _NOT_OF_THE_RUN or not hasattr(args, name) or not before:
            continue
        old, new = (
            list(x) if isinstance(x, tuple) else x for x in (before.get(name, action.default), getattr(args, name))
        )
        if old != new:
            changed[action.option_strings[0]] = [old, new]
    return changed


_OF_THE_NETWORK = ("model", "input_size", "remove_fcu", "data_set", "data_backend")


def of_checkpoint(args, flags):
    """What `--eval` evaluates: the network and the view of the checkpoint's run, where the command line is silent.

    Args:
        flags: {name: value} of the training run, `checkpoint.flags_in`; {} where the file has none.
    Returns (args to evaluate with, lines for the user). Raises ValueError where one of them is no value of that flag.
    """
    named = given(args)
    taken, words = {}, []
    for action in get_args_parser()._actions:
        name, flag = action.dest, action.option_strings[0]
        if name not in _OF_THE_NETWORK or name not in flags or flags[name] == getattr(args, name):
            continue
        if type(flags[name]) is not type(action.default) or action.choices and flags[name] not in action.choices:
            raise ValueError(f"The checkpoint was trained with {flag} {flags[name]!r}, which is no value of this flag.")
        if name in named:
            words.append(f"was trained with {flag} {flags[name]}, not {getattr(args, name)} as {flag} says now.")
        else:
            taken[name] = flags[name]
            words.append(f"was trained with {flag} {flags[name]}, which is taken.")
    args = argparse.Namespace(**vars(args) | taken)
    check(args)
    return args, words


_SCHEDULES = ("cosine", "tanh", "step", "poly", "plateau")
_LIMITS = {
    "must be at least 1": (
        lambda x: x >= 1,
        ("--epochs", "--batch-size", "--evaluate-freq", "--input-size", "--recount", "--accum-iter"),
    ),
    "must be 0 or more": (
        lambda x: x >= 0,
        (
            "--steps-per-epoch",
            "--start_epoch",
            "--warmup-epochs",
            "--num_workers",
            "--semi-lambda",
            "--consistency-lambda",
            "--fairness-lambda",
            "--mask-cnn-ratio",
            "--mask-transformer-ratio",
            "--mask-cnn-ratio-u",
            "--mask-transformer-ratio-u",
            "--color-jitter",
            "--mixup",
            "--cutmix",
            "--lr",
            "--min-lr",
            "--warmup-lr",
            "--weight-decay",
            "--momentum",
        ),
    ),
    "must be above 0": (lambda x: x is None or x > 0, ("--temperature", "--infonce-T", "--clip-grad")),
    "must be from 0 to 1": (
        lambda x: 0 <= x <= 1,
        (
            "--threshold",
            "--reprob",
            "--hflip",
            "--mixup-prob",
            "--mixup-switch-prob",
            "--model-ema-decay",
            "--confidence-momentum",
        ),
    ),
    "must be 0 or more and below 1": (lambda x: 0 <= x < 1, ("--smoothing", "--drop", "--drop-path")),
    "must be a share from 0 to below 1 or a whole number": (
        lambda x: 0 <= x < 1 or x >= 1 and x.is_integer(),
        ("--max-bad-images",),
    ),
    # What torch's generators take, less what the samplers add to it for later epochs.
    "must be from -2**63 to 2**63 - 1": (lambda x: -(2**63) <= x < 2**63, ("--seed",)),
    "must be above 0 and at most 1": (lambda x: 0 < x <= 1, ("--select-ratio", "--layer-decay")),
    "must be at most 1000000": (lambda x: x <= 10**6, ("--epochs", "--steps-per-epoch", "--batch-size")),
    "must be at most 10000": (lambda x: x <= 10**4, ("--input-size",)),
    f"must be one of {', '.join(_SCHEDULES)}": (lambda x: x in _SCHEDULES, ("--sched",)),
    "must be batch, pair or elem": (lambda x: x in ("batch", "pair", "elem"), ("--mixup-mode",)),
    "must be one share or two": (lambda x: x is None or len(x) <= 2, ("--lr-noise",)),
    "must be two numbers with 0 < MIN <= MAX <= 1": (lambda x: 0 < x[0] <= x[1] <= 1, ("--scale",)),
    "must be two numbers": (lambda x: x is None or len(x) == 2, ("--opt-betas", "--cutmix-minmax")),
}


def check(args):
    """Raise ValueError, one sentence that names the flags, where they are wrong whatever the data."""
    for rule, (holds, flags) in _LIMITS.items():
        for flag in flags:
            value = _value(args, flag)
            if not holds(value):
                raise ValueError(f"{flag} {value} {rule}")
    for name, value in vars(recorded(args)).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"--{name.replace('_', '-')} {number} must be a finite number")
    utils.check_device_name(args.device)
    check_folder("--output_dir", args.output_dir)
    requested_amp(args)
    if not args.eval:
        _check_shares(args)
        _check_mixup(args)
        _check_confidence(args)
        _check_streams(args)
        _check_policy(args)
        _check_schedule(args)
        if args.pretrained:
            check_hosted(args.model)


def check_folder(flag, folder):
    """Raise ValueError, one sentence, where the folder of a flag is, or is below, something that is no folder."""
    path = os.path.abspath(folder)
    while path != os.path.dirname(path) and not os.path.isdir(path):
        if os.path.lexists(path):
            raise ValueError(f"{flag} {folder} cannot be a folder, because {path} is a file: choose another")
        path = os.path.dirname(path)


def _check_shares(args):
    if not 0 <= args.mu <= 1:
        raise ValueError(f"--mu {args.mu} must be above 0 and below 1: it is the labelled share of a batch")
    if not semi_supervised(args):
        return
    labelled, unlabelled = labelled_and_unlabelled(args)
    batch = f"in a batch of {args.batch_size} (--batch-size)"
    if labelled == 0:
        raise ValueError(f"--mu {args.mu} leaves no labelled image {batch}: raise --mu or --batch-size")
    if unlabelled == 0:
        raise ValueError(
            f"--mu {args.mu} leaves no unlabelled image {batch}: lower --mu, or pass "
            "--supervise-only to train without them"
        )


def _check_confidence(args):
    both_streams = len(policy_of(args.pseudo_type, 2).distributions) == 2
    for wrong, why in (
        (
            args.pseudo_mixup and args.confidence != "fixed",
            f"--pseudo-mixup weighs the mixed images by --threshold, so --confidence {args.confidence} must be fixed",
        ),
        (
            args.pseudo_mixup and args.align == "labelled",
            "--pseudo-mixup labels before the network has seen the labelled images, so --align labelled has nothing "
            "to follow: choose another",
        ),
        (
            args.pseudo_mixup and both_streams,
            f"--pseudo-mixup needs one probability an image, and --pseudo-type {args.pseudo_type} has two: use cnn, "
            "transformer, fuse or softmax_fuse",
        ),
        (
            args.pseudo_mixup and args.dual_consistency,
            "--pseudo-mixup mixes the strong views, so --dual-consistency cannot compare them with the weak ones: "
            "leave one of them out",
        ),
        (
            args.confidence == "soft" and both_streams,
            f"--confidence soft has no confident stream for --pseudo-type {args.pseudo_type} to ask: use cnn, "
            "transformer, fuse or softmax_fuse",
        ),
        (
            args.fairness_lambda > 0 and args.confidence != "free",
            f"--fairness-lambda needs the averages of --confidence free, not of {args.confidence}",
        ),
        (
            args.teacher == "ema" and not args.model_ema,
            "--teacher ema needs the average that --no-model-ema leaves out: keep one of them",
        ),
        (
            args.teacher == "ema" and args.model_ema_force_cpu,
            "--teacher ema runs the average in every step, and --model-ema-force-cpu keeps it off the device: keep one",
        ),
    ):
        if wrong:
            raise ValueError(why)


def _check_mixup(args):
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax):
        return
    rule = "mixup and cutmix mix a batch with its own reverse, so the labelled batch must be even"
    remedy = "change them or pass --mixup 0 --cutmix 0"
    labelled, _ = labelled_and_unlabelled(args)
    if semi_supervised(args) and labelled % 2:
        raise ValueError(f"{rule}: --batch-size {args.batch_size} with --mu {args.mu} gives {labelled}; {remedy}")
    if (args.semi_start_epoch > 0 or not semi_supervised(args)) and args.batch_size % 2:
        raise ValueError(
            f"{rule}: --batch-size {args.batch_size} is odd and all of it is labelled in the supervised phase; {remedy}"
        )


def _check_streams(args):
    if args.pseudo_type != "cnn" and not has_two_streams(args.model):
        check_name(args.model)
        raise ValueError(
            f"--pseudo-type {args.pseudo_type} chooses between the streams of a two-stream network, and "
            f"{args.model} has one: leave it out"
        )


def _check_schedule(args):
    if not args.sched_on_updates:
        return
    if args.sched != "cosine":
        raise ValueError(f"--sched-on-updates is for --sched cosine: leave it out with --sched {args.sched}")
    if args.lr_noise is not None:
        raise ValueError("--lr-noise changes the rate once an epoch: leave out either it or --sched-on-updates")


def _check_policy(args):
    """Raise ValueError where --aa is no policy, or one that fails as soon as an image comes."""
    kind, *sections = args.aa.split("-")
    if args.aa.lower() in ("", "none"):
        return
    # timm passes over a section without a number, and over the name of a set of operations that it does not know.
    sets = ("tweights", "t3a", "t3aw") if kind == "rand" else ()
    unknown = [section for section in sections if section not in sets and not re.match(r"(?!t)[a-z]+[0-9]", section)]
    try:
        if unknown:
            raise ValueError(f"its part {unknown[0]!r} means nothing")
        with utils.preserved_cpu_generators():
            train_view(32, args.aa)(Image.new("RGB", (32, 32)))
    except ValueError as error:
        reason = str(error.__cause__ or error) or "unknown"  # timm's own, below that of the view
        raise ValueError(
            f"--aa {args.aa!r} is no policy in timm's notation ({reason}): write one like rand-m9-mstd0.5-inc1, "
            "original-mstd0.5 or augmix-m5-w4-d2"
        ) from error


def _value(args, flag):
    return getattr(args, flag.lstrip("-").replace("-", "_"))
