"""Export a checkpoint for use elsewhere: the weights as safetensors, a model card, and the network as ONNX.

    python -m script.export --checkpoint output/run/checkpoint.pth --output FOLDER [--ema] [--no-onnx]

Writes three files into FOLDER: model.safetensors (for predict.py, hubconf.py, --finetune and --eval); README.md, the
model card, made from the eval.json, log.txt and run.json beside the checkpoint as far as they exist; and model.onnx,
which maps normalised `images` (N, 3, S, S) to `logits` (N, classes), summed over the streams, for any N. The logits of
onnxruntime must agree with PyTorch's to 1e-4 for batches of 1 and 3 images; otherwise no model.onnx is kept and the
exit status is 1.
"""

import hashlib
import importlib.util
import io
import json
import logging
import sys
import warnings
from argparse import RawDescriptionHelpFormatter
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch
from torch import nn

import utils
from images.files import read_regular
from models import fold_batchnorm, pretrained
from options import Parser, get_args_parser
from script.compare_runs import is_figure
from training import checkpoint

TOLERANCE = 1e-4  # largest difference of a logit
OPSET = 18
IGNORED_FLAGS = ("output_dir", "resume", "num_workers", "device", "dist_url", "world_size")  # no effect on the results
UNKNOWN = "not available"


class SummedLogits(nn.Module):
    """A network as evaluation measures it: BatchNorm folded into the convolutions, one output, the summed logits."""

    def __init__(self, network):
        super().__init__()
        self.network = fold_batchnorm(network)

    def forward(self, images):
        """Normalised images (N, 3, S, S) -> logits (N, classes)."""
        return sum(self.network(images))


def export_onnx(network, size, path):
    """Write a network as ONNX, with summed logits, and compare it with PyTorch's for batches of 1 and 3 images.

    Returns the largest difference of a logit. Raises ValueError, and writes no file, if a package is missing or the
    difference is above TOLERANCE.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}, or pass --no-onnx.")
    import onnxruntime

    summed = SummedLogits(network).eval().to(memory_format=torch.contiguous_format)
    rng = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 3, size, size, generator=rng) for n in (1, 3)]
    with utils.atomic(path) as file:
        _write_onnx(summed, batches[1], file.name)  # with one image, N = 1 would become a constant
        _name_batch(file.name)
        session = onnxruntime.InferenceSession(file.name, providers=["CPUExecutionProvider"])
        with torch.inference_mode():
            differences = [abs(session.run(None, {"images": x.numpy()})[0] - summed(x).numpy()).max() for x in batches]
        worst = float(max(differences))
        if not worst <= TOLERANCE:  # also if it is NaN
            raise ValueError(f"The ONNX network differs from PyTorch's by {worst:.1e}, above {TOLERANCE}: not kept.")
    return worst


def _write_onnx(network, images, path):
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    shapes = {"images": {0: torch.export.Dim("batch", min=1, max=2**16)}}
    settings = dict(input_names=["images"], output_names=["logits"], opset_version=OPSET, external_data=False)
    with utils.writing(path, "--output"), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # PyTorch's, about its own code
        try:
            torch.onnx.export(network, (images,), path, dynamo=True, dynamic_shapes=shapes, **settings)
        except torch.onnx.OnnxExporterError as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise ValueError(f"PyTorch cannot export this network as ONNX ({reason}): pass --no-onnx.") from error


def _name_batch(path):
    """Name the first dimension of input and output `batch`; ValueError if the graph fixes the number of images."""
    import onnx

    model = onnx.load(path)
    # torch 2.6 records the example's batch size in the shapes of intermediate values that do not depend on it.
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        dimension = value.type.tensor_type.shape.dim[0]
        if value.name == "images" and dimension.HasField("dim_value"):
            raise ValueError(f"As ONNX this network takes {dimension.dim_value} images only: pass --no-onnx.")
        dimension.dim_param = "batch"
    onnx.save(model, path)


# -------------------------------------------------------------------------------- the model card


def _json_file(path):
    """The JSON object in a file, or {} if there is no such file. Raises ValueError if it cannot be read."""
    try:
        content = json.loads(read_regular(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"Cannot read {path} ({error}): correct it or move it away.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: correct it or move it away.")
    return content


def recorded_meters(folder, name, epoch, ema):
    """({meter: value}, source) of a checkpoint, from its eval.json or from its epoch in log.txt; ({}, "") if neither.

    Args:
        folder, name, epoch: the checkpoint's folder, file name and epoch.
        ema: return the meters of the averaged weights.
    """
    evaluated = _json_file(folder / "eval.json")
    if evaluated and evaluated.get("epoch") == epoch and Path(str(evaluated.get("checkpoint"))).name == name:
        return (evaluated.get("ema", {}) if ema else evaluated), "eval.json"
    log, prefix = folder / "log.txt", "test_ema_" if ema else "test_"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # incomplete, because the run was killed
            continue
        if isinstance(record, dict) and record.get("epoch") == epoch:
            meters = {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}
            return meters, f"log.txt, epoch {epoch}"
    return {}, ""


def _table(rows):
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _results(model, folder, name, ema):
    meters, source = recorded_meters(folder, name, model.content.get("epoch"), ema)
    labels = {
        "acc1": "top-1, summed logits, %",
        "acc5": "top-5, %",
        "acc1_head1": "top-1, CNN stream, %",
        "acc1_head2": "top-1, transformer stream, %",
        "acc1_softmax": "top-1, mean of the softmaxes, %",
        "loss": "loss, nats",
        "ece": "expected calibration error",
        "images": "images",
    }
    if not isinstance(meters, dict) or not all(is_figure(meters.get(key)) for key in labels):
        raise ValueError(
            f"The figures of {name} in {folder}, {source}, are no numbers: correct them or move them away."
        )
    rows = [(label, f"{meters[key]:.6g}") for key, label in labels.items() if meters.get(key) is not None]
    return f"{_table(rows)}\n\nFrom {source}." if rows else f"{UNKNOWN}: neither eval.json nor log.txt has this epoch."


def _flags(flags):
    if not flags:
        return f"{UNKNOWN}: the checkpoint holds no flags."
    default = vars(get_args_parser().parse_args([]))
    rows = [(f"`{key}`", f"`{value}`") for key, value in sorted(flags.items())
            if key in default and key not in IGNORED_FLAGS and value != default[key]]  # fmt: skip
    return _table(rows) if rows else "none"


def _split_file(flags):
    name = flags.get("data_split_file", "None")
    if name == "None":
        return "none given"
    path = Path(str(name))
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else f"{UNKNOWN}, the file does not exist"
    return f"`{path.name}`, sha256 {digest}"


def model_card(model, path, ema, onnx):
    """The model card of a checkpoint, as Markdown.

    Args:
        model: a `pretrained.Pretrained`.
        path: the checkpoint it was loaded from.
        ema: whether its weights are the averaged ones.
        onnx: a phrase on model.onnx.
    """
    folder, flags = Path(path).parent, checkpoint.flags_in(model.content, path)
    run = _json_file(folder / "run.json").get("environment")
    run = run if isinstance(run, dict) else {}
    config = model.network.pretrained_cfg
    entry = model.name if model.name in pretrained.NAMES else None
    facts = [
        ("network", f"`{model.name}`, {sum(p.numel() for p in model.network.parameters()):,} parameters"),
        ("weights", f"{'averaged (EMA)' if ema else 'raw'}, `{Path(path).name}`, epoch {model.content.get('epoch')}"),
        ("classes", f"{model.num_classes}, {'names in model.safetensors' if model.classes else f'names {UNKNOWN}'}"),
        ("data set", f"`{model.data_set}`" if model.data_set else UNKNOWN),
        ("labelled images", _split_file(flags)),
        (
            "input",
            f"{model.input_size} px, RGB in 0..1, mean {_round(config['mean'])}, "
            f"standard deviation {_round(config['std'])}",
        ),
        ("git revision of the run", run.get("revision") or UNKNOWN),
        *((f"{key} of the run", run.get(key) or UNKNOWN) for key in ("python", "torch", "torchvision", "timm")),
        ("model.onnx", onnx),
    ]
    hub = f'model = torch.hub.load("CLONE", "{entry}", source="local", pretrained="model.safetensors")'
    use = "python predict.py IMAGE --checkpoint model.safetensors"
    return "\n\n".join(
        [
            f"---\nlibrary_name: pytorch\npipeline_tag: image-classification\ntags: [semiformer, {model.name}]\n---",
            f"# {model.name}",
            "Semi-Supervised Vision Transformers (Weng et al., ECCV 2022), a reimplementation.",
            _table(facts),
            f"## Use\n\nIn a clone of the repository:\n\n```bash\n{use}\n```"
            + (f"\n\n```python\n{hub}\n```" if entry else ""),
            f"## Results\n\n{_results(model, folder, Path(path).name, ema)}",
            f"## Flags that differ from the defaults\n\n{_flags(flags)}",
        ]
    ) + "\n"  # fmt: skip


def _round(values):
    return " ".join(f"{value:.4g}" for value in values)


def main(argv=None):
    """Export a checkpoint and print what was written. Raises ValueError or OSError for bad input."""
    parser = Parser("export.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    pretrained.add_flags(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="folder, created if missing")
    parser.add_argument("--no-onnx", action="store_true", help="do not write model.onnx")
    args = parser.parse_args(argv)
    model = pretrained.from_flags(args)
    with utils.writing(args.output, "--output"):
        args.output.mkdir(parents=True, exist_ok=True)
    about = {key: model.content[key] for key in ("epoch",) if key in model.content}
    about |= {"classes": model.classes} if model.classes else {}
    flags = {**checkpoint.flags_in(model.content, args.checkpoint), "model": model.name, "input_size": model.input_size}
    checkpoint.save_safetensors(model.network.state_dict(), {**about, "args": flags}, args.output / "model.safetensors")
    onnx = "not exported"
    if not args.no_onnx:
        worst = export_onnx(model.network, model.input_size, args.output / "model.onnx")
        onnx = f"summed logits, opset {OPSET}, at most {worst:.1e} from PyTorch (onnxruntime, 1 and 3 images of noise)"
        print(f"model.onnx: {onnx}")
    utils.write_atomic(args.output / "README.md", model_card(model, args.checkpoint, args.ema, onnx), "--output")
    print(utils.printable(f"Exported {model.name} from {args.checkpoint} to {args.output}"))


if __name__ == "__main__":
    sys.excepthook = partial(utils.excepthook, "export.py")
    main()
