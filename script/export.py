"""Make of a checkpoint what others can use: weights as safetensors, a model card, and the network as ONNX.

    python -m script.export --checkpoint output/run/checkpoint.pth --output FOLDER [--ema] [--no-onnx]

FOLDER gets model.safetensors (for predict.py, hubconf.py, --finetune and --eval), README.md (the model card, from the
eval.json, log.txt and run.json beside the checkpoint where they are there) and model.onnx: `images` (N, 3, S, S),
normalised, -> `logits` (N, classes), the sum of the streams'; any N. onnxruntime must give what PyTorch gives, to 1e-4
at 1 and 3 images, else the program ends with status 1 and leaves no model.onnx.
"""

import argparse
import hashlib
import importlib.util
import io
import json
import logging
import os
import sys
import warnings
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path

import torch
from torch import nn

import utils
from models import fold_batchnorm, pretrained
from options import get_args_parser
from training import checkpoint

TOLERANCE = 1e-4  # largest difference of a logit
OPSET = 18
NO_RESULT = ("output_dir", "resume", "num_workers", "device", "dist_url", "world_size")  # flags that change no result
UNKNOWN = "not available"


class Fused(nn.Module):
    """The one-headed network that evaluation measures: images (N, 3, S, S) -> summed logits (N, classes)."""

    def __init__(self, network):
        super().__init__()
        self.network = fold_batchnorm(network)

    def forward(self, images):
        """(N, 3, S, S), normalised -> (N, classes)."""
        return sum(self.network(images))


def export_onnx(network, size, path):
    """Write the fused network as ONNX and compare it; returns the largest difference of a logit at 1 and 3 images.

    Raises ValueError where a package is missing or the difference is above TOLERANCE; then there is no file.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}: pip install {' '.join(missing)}, or pass --no-onnx.")
    import onnxruntime

    fused, temporary = Fused(network).eval().to(memory_format=torch.contiguous_format), f"{path}.tmp"
    draws = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 3, size, size, generator=draws) for n in (1, 3)]
    try:
        _write_onnx(fused, batches[1], temporary)  # of one image, N = 1 would be a constant
        _name_batch(temporary)
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        with torch.inference_mode():
            gaps = [abs(session.run(None, {"images": x.numpy()})[0] - fused(x).numpy()).max() for x in batches]
        if not max(gaps) <= TOLERANCE:
            raise ValueError(
                f"The ONNX network differs from PyTorch's by {max(gaps):.1e}, above {TOLERANCE}: not kept."
            )
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)
    return float(max(gaps))


def _write_onnx(network, images, path):
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    shapes = {"images": {0: torch.export.Dim("batch", min=1, max=2**16)}}
    settings = dict(input_names=["images"], output_names=["logits"], opset_version=OPSET, external_data=False)
    with utils.writing(path, "--output"), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of PyTorch about parts of its own
        try:
            torch.onnx.export(network, (images,), path, dynamo=True, dynamic_shapes=shapes, **settings)
        except torch.onnx.OnnxExporterError as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise ValueError(f"PyTorch cannot make ONNX of this network ({reason}): pass --no-onnx.") from error


def _name_batch(path):
    """Call the first side of input and output `batch`; ValueError where the graph takes one number of images only."""
    import onnx

    model = onnx.load(path)
    # torch 2.6 notes the example's number of images in shapes that do not depend on it.
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        side = value.type.tensor_type.shape.dim[0]
        if value.name == "images" and side.HasField("dim_value"):
            raise ValueError(f"As ONNX this network takes {side.dim_value} images only: pass --no-onnx.")
        side.dim_param = "batch"
    onnx.save(model, path)


# -------------------------------------------------------------------------------- the model card


def _json_file(path):
    """The JSON object in a file beside the checkpoint; {} where there is none. ValueError naming a damaged one."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read {path} ({error}): mend or move it.") from error


def measured(folder, name, epoch, ema):
    """({meter: value}, where it is from) of this checkpoint: its eval.json, else log.txt's line of its epoch; or {}."""
    evaluated = _json_file(folder / "eval.json")
    if evaluated and evaluated.get("epoch") == epoch and Path(evaluated.get("checkpoint", "")).name == name:
        return (evaluated.get("ema", {}) if ema else evaluated), "eval.json"
    log, prefix = folder / "log.txt", "test_ema_" if ema else "test_"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # half-written by a run that was killed
            continue
        if record.get("epoch") == epoch:
            found = {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}
            return found, f"log.txt, epoch {epoch}"
    return {}, ""


def _table(rows):
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])


def _results(model, folder, name, ema):
    meters, source = measured(folder, name, model.content.get("epoch"), ema)
    words = {
        "acc1": "top-1, summed logits, %",
        "acc5": "top-5, %",
        "acc1_head1": "top-1, CNN stream, %",
        "acc1_head2": "top-1, transformer stream, %",
        "acc1_softmax": "top-1, mean of the softmaxes, %",
        "loss": "loss, nats",
        "ece": "expected calibration error",
        "images": "images",
    }
    rows = [(word, f"{meters[key]:.6g}") for key, word in words.items() if meters.get(key) is not None]
    return f"{_table(rows)}\n\nFrom {source}." if rows else f"{UNKNOWN}: neither eval.json nor log.txt has this epoch."


def _flags(flags):
    if not flags:
        return f"{UNKNOWN}: the checkpoint holds no flags."
    default = vars(argparse.ArgumentParser(parents=[get_args_parser()]).parse_args([]))
    rows = [(f"`{key}`", f"`{value}`") for key, value in sorted(flags.items())
            if key in default and key not in NO_RESULT and value != default[key]]  # fmt: skip
    return _table(rows) if rows else "none"


def _split(flags):
    name = flags.get("data_split_file", "None")
    if name == "None":
        return "none given"
    path = Path(name)
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else f"{UNKNOWN}, the file is not there"
    return f"`{path.name}`, sha256 {digest}"


def card(model, path, ema, onnx):
    """The model card of a Pretrained from the checkpoint `path`, Markdown; `onnx` is a sentence on model.onnx."""
    folder, flags = Path(path).parent, pretrained.flags_in(model.content)
    run = _json_file(folder / "run.json").get("environment", {})
    about = model.network.pretrained_cfg
    entry = model.name if model.name in pretrained.NAMES else None
    facts = [
        ("network", f"`{model.name}`, {sum(p.numel() for p in model.network.parameters()):,} parameters"),
        ("weights", f"{'averaged (EMA)' if ema else 'raw'}, `{Path(path).name}`, epoch {model.content.get('epoch')}"),
        ("classes", f"{model.num_classes}, {'names in model.safetensors' if model.classes else f'names {UNKNOWN}'}"),
        ("data set", f"`{model.data_set}`" if model.data_set else UNKNOWN),
        ("labelled images", _split(flags)),
        (
            "input",
            f"{model.input_size} px, RGB in 0..1, mean {_round(about['mean'])}, deviation {_round(about['std'])}",
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


def main(words=None):
    """Export, and say what was written. Raises ValueError or OSError, one sentence, for bad input."""
    parser = argparse.ArgumentParser(
        "export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    pretrained.add_flags(parser)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="made where it is not there")
    parser.add_argument("--no-onnx", action="store_true", help="leave model.onnx out")
    args = parser.parse_args(words)
    model = pretrained.from_flags(args)
    with utils.writing(args.output, "--output"):
        args.output.mkdir(parents=True, exist_ok=True)
    about = {key: model.content[key] for key in ("epoch",) if key in model.content}
    about |= {"classes": model.classes} if model.classes else {}
    flags = {**pretrained.flags_in(model.content), "model": model.name, "input_size": model.input_size}
    checkpoint.save_safetensors(model.network.state_dict(), {**about, "args": flags}, args.output / "model.safetensors")
    said = "not exported"
    if not args.no_onnx:
        gap = export_onnx(model.network, model.input_size, args.output / "model.onnx")
        said = f"summed logits, opset {OPSET}, at most {gap:.1e} from PyTorch's (onnxruntime, 1 and 3 images of noise)"
        print(f"model.onnx: {said}")
    utils.write_atomic(args.output / "README.md", card(model, args.checkpoint, args.ema, said), "--output")
    print(f"Exported {model.name} of {args.checkpoint} to {args.output}")


if __name__ == "__main__":
    sys.excepthook = partial(utils.excepthook, "export.py")
    main()
