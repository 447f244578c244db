"""Train or evaluate Semiformer: builds everything from the flags and runs the epoch loop.

    torchrun --nproc_per_node=8 semi_main.py --data-set SEMI-IMNET --data-path IMAGENET --data-split-file LIST ...

Source of the loop: DeiT (facebookresearch/deit, main.py); of the method: Weng et al., ECCV 2022.
"""

import math
import sys
import time
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

import options
import utils
from datasets import build_training_sets, build_validation_set
from engine import evaluate_together, train_one_epoch
from images.loading import TrainingLoader, divided_workers, evaluation_loader, read_batches, to_device
from losses import Recipe
from models import build_model, channels_last, enable_grad_checkpointing, fold_batchnorm, has_two_streams
from models.pretrained import hosted_weights
from options import get_args_parser
from pseudo_labels import PseudoLabeller
from samplers import training_order
from training import checkpoint, output_folder, report, tensorboard_log, validation
from training.checkpoint import TrainState
from training.initial_weights import initial_weight_files, load_initial_weights
from training.optimization import build_optimizer, build_scheduler, learning_rates, mixed_precision
from utils import print_main


def _mixup(args, num_classes):
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax):
        return None
    return Mixup(
        args.mixup,
        args.cutmix,
        args.cutmix_minmax,
        args.mixup_prob,
        args.mixup_switch_prob,
        args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def _network(args, num_classes, device):
    model = build_model(
        args.model, num_classes, args.input_size, args.drop, args.drop_path, args.drop_block, args.remove_fcu
    )
    return channels_last(model.to(device))


def _average(args, model):
    """The EMA of the network's weights and buffers, which begins as a copy of them; None without --model-ema."""
    device = "cpu" if args.model_ema_force_cpu else None
    return ModelEmaV3(model, decay=args.model_ema_decay, device=device) if args.model_ema else None


def _distributed(model, device):
    """The network as it trains: wrapped in DDP where there are several processes."""
    if not dist.is_initialized():
        return model
    unused = model.unused_parameters() if hasattr(model, "unused_parameters") else []
    # DDP would wait for gradients that never come.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, unused)
    # DDP broadcasts rank 0's running statistics before every forward pass, as in the published code.
    return DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )


def compile_network(args, model, backend="inductor"):
    """Compile the network in place (`--compile`).

    Under DDP the graph is split where a bucket of gradients is complete, so that they are exchanged during backward.
    That cannot be done with activations that are computed again: there they are exchanged after it.
    """
    if args.grad_checkpointing:
        torch._dynamo.config.optimize_ddp = False
    model.compile(backend=backend)


def _image_bytes(args):
    """Size in memory of a view on the host."""
    return 3 * args.input_size**2 * (1 if args.data_backend == "fast" else 4)


def _evaluate(args, models, images, device, autocast, tally=None):
    """The meters of each of the networks, which see every image in one pass; a tally takes a single network."""
    world, rank = utils.world_and_rank()
    loader = evaluation_loader(
        images,
        int(3 * args.batch_size),
        world=world,
        rank=rank,
        num_workers=args.num_workers,
        pin_memory=args.pin_mem and device.type == "cuda",
        image_bytes=_image_bytes(args),
    )
    batches = to_device(read_batches(loader), device, images.finish)
    folded = [fold_batchnorm(model) for model in models]
    if tally is None:
        return evaluate_together(folded, batches, autocast=autocast)
    return evaluate_together(folded, tally.clocked(batches), autocast=autocast, observe=tally.add)


def _summary(name, meters):
    """One line about an evaluation."""
    labels = {
        "": "acc1",
        "CNN": "acc1_head1",
        "transformer": "acc1_head2",
        "softmax mean": "acc1_softmax",
        "top-5": "acc5",
    }
    figures = [f"{label} {meters[key]:.3f}".strip() for label, key in labels.items() if key in meters]
    return f"* {name} top-1 {', '.join(figures)}, loss {meters['loss']:.4f}, {meters['images']} images"


def evaluate_checkpoint(args, device):
    """`--eval`: evaluate the raw and the averaged weights of `--resume`; writes eval.json and the reports."""
    resume = output_folder.resume_file(args.resume, args.output_dir)
    if not resume:
        raise ValueError("--eval needs --resume CHECKPOINT, the file to evaluate.")
    content = checkpoint.read(resume)
    args, words = options.of_checkpoint(args, checkpoint.flags_in(content, resume))
    for line in words:
        print_main(f"{resume} {line}")
    images = build_validation_set(args)
    classes = images.samples.classes
    model = _network(args, len(classes), device)
    autocast, _, precision = mixed_precision(options.requested_amp(args), device)
    checkpoint.load_weights(model, checkpoint.weights_in(content, resume), resume)
    if mismatch := checkpoint.class_mismatch(checkpoint.classes_in(content), classes):
        print_main(f"Warning: {resume} is of other classes than the validation images, {mismatch}: check --data-path.")

    def measured(name, prefix):
        tally = report.Tally(len(classes), device)
        (meters,) = _evaluate(args, [model], images, device, autocast, tally)
        meters |= tally.over_ranks()
        print_main(_summary(name, meters) + ", " + report.summary(meters))
        if args.output_dir:
            streams = 2 if "acc1_head2" in meters else 1
            utils.on_main(report.write, args.output_dir, tally, classes, streams, prefix)
        return meters

    meters = measured("raw", "")
    if "model_ema" in content:
        name = f"{resume} (model_ema)"
        checkpoint.load_weights(model, checkpoint.weights_in(content, name, "model_ema"), name)
        meters["ema"] = measured("EMA", "ema_")
    meters |= {"classes": len(classes), "checkpoint": resume, "epoch": content.get("epoch"), "amp": precision}
    if args.output_dir and utils.is_main():
        utils.write_json(Path(args.output_dir, "eval.json"), meters)
    return meters


class Run:
    """One training run: the objects that the flags describe, its plan, and its files."""

    def __init__(self, args, device):
        self.args, self.device, self.output = args, device, output_folder.Output(args.output_dir)
        self.world, self.rank = utils.world_and_rank()
        self.labelled, self.unlabelled = build_training_sets(args, options.semi_supervised(args))
        classes = self.labelled.samples.classes
        self.validation = build_validation_set(args, classes)
        self.validation[0]  # an image that cannot be evaluated is found now, and not after an epoch
        self.recipe = Recipe.from_args(args)
        self.mixup = _mixup(args, len(classes))
        self.autocast, scaler, self.precision = mixed_precision(options.requested_amp(args), device)
        model = _network(args, len(classes), device)
        if args.grad_checkpointing:
            enable_grad_checkpointing(model)
        self.n_parameters = sum(p.numel() for p in model.parameters())
        optimizer = build_optimizer(args, model)
        bad_images = {name: images.bad_images for name, images in self._training_sets().items()}
        scheduler = build_scheduler(args, optimizer)
        self.state = TrainState(
            model, optimizer, scheduler, scaler, _average(args, model), classes=classes, bad_images=bad_images
        )
        if self.unlabelled is not None:
            self.state.labeller = self._labeller()
        # Both orders are built before the first step, so that a set that is too small is found now and not in epoch 30.
        self.labelled_order, self.unlabelled_order = (
            images and training_order(len(images), self.world, self.rank, args.seed, args.repeated_aug)
            for images in (self.labelled, self.unlabelled)
        )
        self.loaders = {
            stream: TrainingLoader(
                images,
                order,
                seed=args.seed,
                rank=self.rank,
                stream=stream,
                image_bytes=_image_bytes(args) * len(images.transforms),
            )
            for stream, images, order in (
                (0, self.labelled, self.labelled_order),
                (1, self.unlabelled, self.unlabelled_order),
            )
            if images is not None
        }
        self.phases = {semi: self._phase(semi) for semi in {self.is_semi(0), self.is_semi(args.epochs - 1)}}
        self.tensorboard = None
        self._load()
        if args.compile:
            compile_network(args, model)  # after the EMA was copied: the EMA and evaluation copies stay uncompiled

    def _labeller(self):
        """What turns the logits of weak views into pseudo labels, with all that it learns on the way."""
        args, classes = self.args, len(self.labelled.samples.classes)
        counts = torch.bincount(torch.as_tensor(self.labelled.targets[self.labelled.indices]), minlength=classes)
        self.labelled_counts = counts
        labeller = PseudoLabeller(
            args.pseudo_type,
            args.threshold,
            args.temperature,
            streams=1 + has_two_streams(args.model),
            num_classes=classes,
            rule=args.confidence,
            align=args.align,
            momentum=args.confidence_momentum,
            shares=counts / counts.sum() if args.align == "shares" else None,
            images=self.unlabelled.indices if args.confidence == "flex" else None,
        )
        return labeller.to(self.device)

    def _training_sets(self):
        sets = {"labelled": self.labelled, "unlabelled": self.unlabelled}
        return {name: images for name, images in sets.items() if images is not None}

    def _load(self):
        # Where a run begins. The first of these that applies wins, and nothing after it is read:
        # 1. --resume auto: the newest complete checkpoint of --output_dir, where it holds one;
        # 2. --resume FILE or URL: that checkpoint, or only its weights if it has no more;
        # 3. --pretrained, --finetune, then the --*-load flags as ordered in initial_weights.LOADERS: weights alone, at
        #    --start_epoch;
        # 4. from scratch: weights drawn from --seed, at --start_epoch.
        args, state = self.args, self.state
        self.resumed, self.changed = output_folder.resume_file(args.resume, args.output_dir), {}
        # Whether the run goes on in the folder of its checkpoint; another folder is a fork's.
        self.goes_on = bool(self.resumed) and output_folder.is_inside(self.resumed, args.output_dir or "/")
        if self.resumed:
            self._resume(checkpoint.read(self.resumed))
        else:
            # Rank 0 downloads them and the others receive them, so that all have them or stop with its sentence.
            hosted = utils.on_main(hosted_weights, args.model, args.input_size) if args.pretrained else None
            load_initial_weights(args, state.model, hosted)
            if state.ema is not None:
                state.ema.set(state.model)
        if args.start_epoch and state.epoch < 0:
            state.epoch = args.start_epoch - 1
            state.scheduler.step(state.epoch)

    def _resume(self, content):
        """Load a checkpoint: moments, counters and position are its own, everything else is that of the flags."""
        args, state, flags = self.args, self.state, checkpoint.flags_in(content, self.resumed)
        state.from_dict(content, self.resumed)
        self.changed = options.changes(flags, args)
        for flag, (old, new) in self.changed.items():
            print_main(f"Changed since {self.resumed}: {flag} {old} -> {new}")
        if not self.goes_on:
            state.best = TrainState(None).best  # of the epochs of this run, whose folder has no best.pth yet
            state.pending = None

    def is_semi(self, epoch):
        """Whether the epoch uses unlabelled images."""
        return self.unlabelled is not None and self.recipe.is_semi(epoch)

    def _phase(self, semi):
        """(labelled images, unlabelled images, steps) of an epoch's batches; ValueError where one cannot be filled."""
        args = self.args
        sizes = options.labelled_and_unlabelled(args) if semi else (args.batch_size, 0)
        if args.steps_per_epoch:
            return *sizes, args.steps_per_epoch
        for what, order, size in zip(("labelled", "unlabelled"), (self.labelled_order, self.unlabelled_order), sizes):
            if size and len(order) < size:
                raise ValueError(
                    f"{len(order)} {what} images a process do not make one batch of {size}: lower --batch-size, "
                    "or set --steps-per-epoch, which repeats images."
                )
        return *sizes, len(self.labelled_order) // sizes[0]

    def first_step(self, epoch):
        """The number of the epoch's first step, counted from 0 over all epochs."""
        return sum(self.phases[self.is_semi(before)][2] for before in range(epoch))

    def print_plan(self):
        """Print what the run will do, and write it to OUTPUT_DIR/run.json before the first step."""
        args, rates = self.args, learning_rates(self.args)
        classes, sizes = len(self.labelled.samples.classes), (self.labelled, self.unlabelled or (), self.validation)
        print_main(f"{args.model}: {self.n_parameters:,} parameters, {classes} classes, amp {self.precision}")
        print_main("{:,} labelled, {:,} unlabelled, {:,} validation images".format(*map(len, sizes)))
        phases = {}
        for semi, (labelled, unlabelled, steps) in sorted(self.phases.items()):
            name = "semi-supervised" if semi else "supervised"
            phases[name] = {"labelled": labelled, "unlabelled": unlabelled, "steps_per_epoch": steps}
            print_main(
                f"{name}: {labelled} + {unlabelled} images a process and step, "
                f"{(labelled + unlabelled) * self.world} in all on {self.world} process(es); {steps} steps an epoch"
                + (f", {args.accum_iter} an update" if args.accum_iter > 1 else "")
            )
        shown = sorted({0, 1, 2, args.warmup_epochs + 1, args.epochs // 2, args.epochs - 1} & set(range(args.epochs)))
        if args.confidence == "flex" and self.unlabelled is not None:
            size = len(self.state.labeller.rules) * 4 * len(self.unlabelled) / 2**20
            print_main(f"--confidence flex keeps the last sure class of every unlabelled image: {size:,.1f} MB")
        when = "at the start of" if args.sched_on_updates else "in"
        print_main("learning rate: " + ", ".join(f"{rates[e]:.3g} {when} epoch {e}" for e in shown))
        if args.layer_decay < 1:
            scales = sorted({group["lr_scale"] for group in self.state.optimizer.param_groups})
            print_main(f"layer decay {args.layer_decay:g}: {len(scales)} layers, {scales[0]:.3g} to 1 of that rate")
        if not args.output_dir:
            print_main("No --output_dir: nothing of this run is saved.")
        self.output.write_run_json(
            lambda: {
                "args": vars(options.recorded(args)),
                "environment": utils.environment(),
                "n_parameters": self.n_parameters,
                "world_size": self.world,
                "amp": self.precision,
                "phases": phases,
                "images": dict(zip(("labelled", "unlabelled", "validation"), map(len, sizes))),
                "resumed_from": self.resumed or None,
                "changed": self.changed,
            },
            goes_on=self.goes_on,
        )

    def start_loading(self, epoch):
        """Let the data workers begin with an epoch, if it is one of this run and they have not begun yet."""
        if epoch < self.args.epochs:
            *sizes, steps = self.phases[self.is_semi(epoch)]
            workers = divided_workers(self.args.num_workers, *sizes)
            pin = self.args.pin_mem and self.device.type == "cuda"
            for stream, size in enumerate(sizes):
                if size:
                    self.loaders[stream].start(epoch, size, steps, workers[stream], pin)

    def train_epoch(self, epoch):
        """Train for one epoch. Its meters are `state.pending` until the epoch has been evaluated and logged."""
        args, semi = self.args, self.is_semi(epoch)
        steps = self.phases[semi][-1]
        utils.seed_everything(args.seed, epoch, self.rank)
        self.start_loading(epoch)

        def batches(stream, images):
            read = self.loaders[stream].read()
            return to_device(read, self.device, images.finish, (args.seed, epoch, self.rank, stream))

        meters = train_one_epoch(
            self.state,
            # Wrapped anew in every epoch, as it is after a resume: DDP regroups the gradients after its first step, and
            # the groups decide in which order those of more than two ranks are summed, which changes the rounding.
            _distributed(self.state.model, self.device),
            self.state.ema.module if args.teacher == "ema" else self.state.model,
            batches(0, self.labelled),
            batches(1, self.unlabelled) if semi else None,
            self.recipe,
            epoch=epoch,
            steps=steps,
            autocast=self.autocast,
            mixup=self.mixup,
            clip_grad=args.clip_grad,
            accum_iter=args.accum_iter,
            write=self.tensorboard and self.tensorboard.writer(self.first_step(epoch)),
        )
        unreadable = sum(images.bad_images.end_epoch() for images in self._training_sets().values())
        if unreadable:
            print_main(f"Unreadable images in this epoch: {unreadable}.")
        self.state.epoch = epoch
        meters |= self._concentration() if semi else {}
        # Every rank gets rank 0's running statistics, so that the logged figures are those of the checkpoint.
        utils.broadcast_buffers(self.state.model, *([self.state.ema.module] if self.state.ema is not None else []))
        self.state.pending = meters | {"bad_images": unreadable}

    def _concentration(self):
        """The labeller's figures of the epoch's classes; prints a warning where they have collapsed into one."""
        figures, counts = self.state.labeller.concentration(), self.labelled_counts
        if (figures.get("pseudo_largest") or 0) > 0.5 and len(counts) > 2 and counts.max() <= 2 * counts.min():
            print_main(
                f"Warning: {figures['pseudo_largest']:.0%} of the pseudo labels that count are of one class, although "
                "the labelled set is balanced: they may be collapsing. Raise --threshold, or see --align."
            )
        if self.tensorboard:
            self.tensorboard.add("train", self.first_step(self.state.epoch + 1) - 1, figures)
        return figures

    def is_measured(self, epoch):
        """Whether the epoch ends with an evaluation and a line in log.txt."""
        return epoch % self.args.evaluate_freq == 0 or epoch == self.args.epochs - 1

    def evaluate(self, epoch):
        """Evaluate the raw weights and, under the meters `ema_<meter>`, the averaged ones; updates the best epoch.

        Raises FloatingPointError where the loss is not finite.
        """
        args, state, networks = self.args, self.state, [self.state.model]
        if state.ema is not None:
            on_cpu = args.model_ema_force_cpu and self.device.type == "cuda"
            networks.append(deepcopy(state.ema.module).to(self.device) if on_cpu else state.ema.module)
        meters, *averaged = _evaluate(args, networks, self.validation, self.device, self.autocast)
        print_main(_summary("raw", meters))
        for each in averaged:
            print_main(_summary("EMA", each))
            meters |= {f"ema_{name}": value for name, value in each.items() if name != "images"}
        meters.pop("images")
        if not math.isfinite(meters["loss"]):
            raise FloatingPointError(
                f"After epoch {epoch} the loss on the validation images is {meters['loss']}: the weights are broken. "
                "Lower --lr, set --clip-grad or use --amp off."
            )
        if meters["acc1"] > state.best["acc1"] or state.best["epoch"] < 0:
            state.best = {"acc1": meters["acc1"], "epoch": epoch}
        return meters

    def step_schedule(self, epoch, test_meters):
        """Set the learning rate of the next epoch; `test_meters` are None where this one was not evaluated."""
        plateau = getattr(self.state.scheduler, "lr_scheduler", None)
        # Where there is no new top-1, the best one so far; a fork counts its own, but its schedule counts on.
        best = max(self.state.best["acc1"], plateau.best if plateau else 0)
        self.state.scheduler.step(epoch, metric=test_meters["acc1"] if test_meters else best)

    def log(self, epoch, train_meters, test_meters):
        """Append the epoch's line to log.txt, and its test figures to TensorBoard."""
        record = {f"train_{k}": v for k, v in train_meters.items()} | {f"test_{k}": v for k, v in test_meters.items()}
        self.output.log({**record, "epoch": epoch, "n_parameters": self.n_parameters})
        if self.tensorboard:
            self.tensorboard.add("test", self.first_step(epoch + 1) - 1, test_meters)

    def save(self, keep_previous=True):
        """Write the state under the names of its epoch; before its evaluation as checkpoint.pth alone.

        Raises FloatingPointError where weights or moments are not finite; the files stay as they are.
        """
        state, names = self.state, []
        if state.pending is None:
            names += [output_folder.FORK.format(state.epoch)] if self.is_fork(state.epoch) else []
            names += [output_folder.BEST] if state.best["epoch"] == state.epoch else []
        # ours: in every epoch, not in every --evaluate-freq, because a preempted job repeats what follows this file.
        names.append(output_folder.LATEST)

        def content():
            content = state.to_dict(options.recorded(self.args))
            if place := validation.not_finite({key: content.get(key) for key in ("model", "model_ema", "optimizer")}):
                raise FloatingPointError(
                    f"After epoch {state.epoch} {place} is not finite: the weights are broken, and not saved. "
                    "Lower --lr, set --clip-grad or use --amp off."
                )
            return content

        self.output.save(content, names, keep_previous)

    def tidy(self):
        """Prepare the output folder, as `Output.tidy`."""
        done = self.state.epoch - (self.state.pending is not None)
        known = self.goes_on and not {"--epochs", "--evaluate-freq"} & set(self.changed)
        self.output.tidy(done, [epoch for epoch in range(done + 1) if known and self.is_measured(epoch)])

    def way_on(self):
        """How a run that was stopped goes on, for the user."""
        saved = self.output.folder and (self.output.folder / output_folder.LATEST).exists()
        return "--resume auto goes on" if saved else "nothing of it is saved"

    def way_back(self):
        """How a run whose weights are ruined goes on, for the user; "" where there is nothing to go back to."""
        previous = self.output.folder and self.output.folder / output_folder.PREVIOUS
        if not previous or not previous.exists():
            return ""
        return f"--resume auto would start from the same weights again; --resume {previous} is an epoch earlier."

    def is_fork(self, epoch):
        """Whether ablations fork here: the last epoch before the semi-supervised or the consistency phase."""
        recipe = self.recipe
        starts = {recipe.semi_start_epoch} if self.unlabelled is not None else set()
        if starts and recipe.dual_consistency:
            starts.add(max(recipe.semi_start_epoch, recipe.consistency_start_epoch))
        return epoch + 1 in starts


def train(args, device):
    """Train from where the flags begin to `--epochs`; returns the Run."""
    utils.seed_everything(args.seed)  # the same initial weights on every rank
    run = Run(args, device)
    state = run.state
    run.print_plan()
    run.tidy()
    if args.resume == "auto" and run.resumed and Path(run.resumed).name != output_folder.LATEST:
        # checkpoint.pth is missing or damaged; a damaged one must not become checkpoint.prev.pth.
        run.save(keep_previous=False)
    first, start = state.epoch + 1, time.time()
    if first >= args.epochs and state.pending is None:
        begun = run.resumed or "the start"
        print_main(f"Nothing left to train: {begun} is at epoch {first - 1} of --epochs {args.epochs}.")
    elif args.tensorboard:
        run.tensorboard = tensorboard_log.TensorBoardLog(Path(args.output_dir, "tensorboard"), run.first_step(first))
    try:
        _train_epochs(run)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"stopped in epoch {state.epoch + (state.pending is None)}; {run.way_on()}") from error
    except FloatingPointError as error:
        raise FloatingPointError(f"{error} {run.way_back()}") from error
    best = f"; best top-1 {state.best['acc1']:.3f} in epoch {state.best['epoch']}" if state.best["epoch"] >= 0 else ""
    print_main(f"Trained in {time.time() - start:.0f} s{best}.")
    return run


def _train_epochs(run):
    state, epochs = run.state, run.args.epochs
    for epoch in range(state.epoch + (state.pending is None), epochs):
        is_saved = state.pending is not None  # the resumed checkpoint has this epoch, trained but not evaluated
        if not is_saved:
            run.train_epoch(epoch)
            run.start_loading(epoch + 1)
            if is_saved := run.is_measured(epoch):
                run.save()  # so that neither an error nor a kill in the evaluation costs the epoch
        test_meters = run.evaluate(epoch) if run.is_measured(epoch) else None
        train_meters, state.pending = state.pending, None
        run.step_schedule(epoch, test_meters)
        if test_meters:
            run.log(epoch, train_meters, test_meters)
        run.save(keep_previous=not is_saved)


def main(args):
    """Do what the flags ask for. Raises ValueError or OSError for bad input."""
    options.check(args)
    initial_weight_files(args)  # refuses a flag without its file before any data is read
    if args.tensorboard and not args.eval:
        tensorboard_log.check(args.output_dir)
    if args.deterministic:
        utils.make_deterministic()
    device = utils.init_distributed(args.device, args.dist_url, args.world_size, args.use_submitit)
    args = options.fit_workers(args)  # here, because the machine that submitted a job may have other cores
    options.print_notes(args)
    if args.output_dir:
        with utils.writing(args.output_dir):
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    if args.eval:
        evaluate_checkpoint(args, device)
    else:
        with output_folder.claimed(args.output_dir, args.resume, args.overwrite):
            train(args, device)
    utils.leave_group()


if __name__ == "__main__":
    sys.excepthook = partial(utils.excepthook, "semi_main.py")
    utils.interrupt_once()
    main(options.Parser("semi_main.py", parents=[get_args_parser()]).parse_args())
