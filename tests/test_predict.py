"""predict.py: the classes that evaluation counts, on files of any kind, and one sentence for what is wrong."""

import csv
import json
import math
import os

import pytest
import torch

import predict
from datasets import build_validation_set
from engine import evaluate
from models import build_model, fold_batchnorm, pretrained
from tests.trees import ROOT, SMALL, broken_images, draw, forked, make_fashion, make_tree, parse, special_files
from training import checkpoint
from training.optimization import mixed_precision

NAMES = ["class0", "class1", "class2"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("tree"), train=1, val=5)


@pytest.fixture(scope="module")
def file(tree, tmp_path_factory):
    """A checkpoint of a network whose classes depend on the image, and whose average is another one."""
    torch.manual_seed(0)
    model, average = (build_model("Semiformer_micro_patch16", 3).train() for _ in range(2))
    for network in (model, average):
        network(torch.randn(8, 3, 48, 48))
    args = parse(*SMALL, "--data-path", tree)
    path = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    weights = {"model": model.state_dict(), "model_ema": average.state_dict()}
    torch.save({**weights, "classes": NAMES, "args": args, "epoch": 7}, path)
    return path


def rows(text):
    return list(csv.DictReader(text.splitlines()))


@pytest.mark.parametrize("ema", [False, True])
def test_predictions_are_those_that_evaluation_counts(tree, file, capsys, ema):
    words = ["--ema"] if ema else []
    assert predict.main([str(tree / "val"), "--checkpoint", str(file), "--batch-size", "4", *words]) == 0
    found = rows(capsys.readouterr().out)
    best = [row for row in found if row["rank"] == "1"]
    views = build_validation_set(checkpoint.read(file)["args"])
    assert [row["path"] for row in best] == [f"{tree}/val/{views.samples.source.path(i)}" for i in range(15)]
    ours = torch.tensor([NAMES.index(row["class"]) for row in best])
    truth = torch.tensor([NAMES.index(row["path"].split("/")[-2]) for row in best])
    network, autocast = pretrained.load(file, ema=ema).network, mixed_precision("off", torch.device("cpu"))[0]
    images = torch.stack([views[i][0] for i in range(15)])
    assert evaluate(fold_batchnorm(network), [(images, ours)], autocast=autocast)["acc1"] == 100
    measured = evaluate(fold_batchnorm(network), [(images, truth)], autocast=autocast)["acc1"]
    assert measured == pytest.approx(100 * (ours == truth).double().mean().item())
    for k in range(15):
        three = [float(row["probability"]) for row in found[3 * k : 3 * k + 3]]
        assert three == sorted(three, reverse=True) and sum(three) == pytest.approx(1, abs=2e-6)
    with torch.no_grad():
        probabilities = sum(network(images)).softmax(1).amax(1)
    assert [float(row["probability"]) for row in best] == pytest.approx(probabilities.tolist(), abs=1e-5)


def test_json_has_the_same_and_is_written_whole(tree, file, tmp_path, capsys):
    words = [str(tree / "val/class1"), "--checkpoint", str(file), "--top", "2"]
    predict.main(words)
    table = rows(capsys.readouterr().out)
    assert predict.main([*words, "--format", "json", "--output", str(tmp_path / "p.json")]) == 0
    assert capsys.readouterr().out == "" and [path.name for path in tmp_path.iterdir()] == ["p.json"]
    found = json.loads((tmp_path / "p.json").read_text())
    flat = [(each["path"], c["class"], c["probability"]) for each in found for c in each["top"]]
    assert len(flat) == 10 and flat == [(row["path"], row["class"], float(row["probability"])) for row in table]


def test_an_image_that_cannot_be_read_is_named_and_the_others_are_predicted(tree, file, tmp_path, capsys):
    broken = broken_images(tmp_path)
    draw(tmp_path / "a.png"), draw(tmp_path / "z.png", mode="L")
    missing = str(tmp_path / "none.jpg")
    assert predict.main([missing, str(tmp_path), "--checkpoint", str(file), "--batch-size", "3"]) == 1
    printed = capsys.readouterr()
    assert [row["path"] for row in rows(printed.out)][::3] == [f"{tmp_path}/a.png", f"{tmp_path}/z.png"]
    lines = printed.err.splitlines()
    named = [name for name in broken if not name.startswith("folder")]  # a folder is gone into
    assert len(lines) == len(named) + 1 and f"Cannot read the image {missing}: No such file" in lines[0]
    assert all(any(f"{tmp_path}/{name}: " in line for line in lines) for name in named)


def test_special_files_and_other_formats_are_named_and_the_rest_is_predicted(file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    special = special_files(tmp_path / "images")
    for name in ("a.gif", "b.png"):
        draw(tmp_path / "images" / name)
    for name in ("1.heic", "2.heic", "notes.txt"):
        (tmp_path / "images" / name).write_text("")
    (tmp_path / "images" / "up").symlink_to("..", target_is_directory=True)
    assert predict.main(["images", "images/fifo.jpg", "--checkpoint", str(file), "--workers", "1"]) == 1
    printed = capsys.readouterr()
    assert [row["path"] for row in rows(printed.out)][::3] == ["images/a.gif", "images/b.png"]
    first, *named, last = printed.err.splitlines()
    assert first == "predict.py: pictures below images are left out: 2 .heic, whose format is not read here."
    assert {line.split("/")[1].split(": ")[0] for line in named} == {*special}
    assert last == "predict.py: Cannot read the image images/fifo.jpg: it is not a regular file"


def test_without_names_classes_are_numbers_or_those_of_a_file(tree, file, tmp_path, capsys):
    torch.save(checkpoint.read(file)["model"], tmp_path / "bare.pth")
    words = [str(tree / "val/class0"), "--checkpoint", str(tmp_path / "bare.pth"), "--top", "1"]
    words += ["--model", "Semiformer_micro_patch16", "--input-size", "48"]
    predict.main(words)
    printed = capsys.readouterr()
    assert "bare.pth has no class names, so classes are numbers" in printed.err
    numbers = [row["class"] for row in rows(printed.out)]
    (tmp_path / "names.txt").write_text("\ufeffgrüne Äpfel\nb, c\n\nd\n", encoding="utf-8")
    predict.main([*words, "--classes", str(tmp_path / "names.txt")])
    printed = capsys.readouterr()
    assert [row["class"] for row in rows(printed.out)] == [["grüne Äpfel", "b, c", "d"][int(n)] for n in numbers]
    assert printed.err == ""


@pytest.mark.parametrize("data_set", ["SEMI-IMNET", "FASHION"])
def test_the_view_and_its_description_are_evaluations(tree, tmp_path, data_set):
    from timm.data import create_transform, resolve_model_data_config

    make_fashion(tmp_path)
    root = {"SEMI-IMNET": tree, "FASHION": tmp_path}[data_set]
    args = parse(*SMALL[:-2], "--data-set", data_set, "--data-path", root)
    model = build_model("Semiformer_micro_patch16", 3)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "a.pth")
    loaded = pretrained.load(tmp_path / "a.pth")
    views = build_validation_set(args)
    image = views.samples.source.load(0)
    assert torch.equal(loaded.view(image), views[0][0]) and not loaded.network.training
    timms = create_transform(**resolve_model_data_config(loaded.network))(image)
    assert (timms - loaded.view(image)).abs().max() < 1e-6


@pytest.mark.parametrize("words, message", [
    (["--model", "resnet18"], "was trained with --model Semiformer_micro_patch16, not resnet18: leave --model out"),
    (["--input-size", "64"], "was trained with --input-size 48, not 64: leave --input-size out"),
    (["--classes", "nowhere.txt"], r"Cannot read --classes nowhere.txt \(No such file or directory\)"),
    (["--classes", __file__], "names do not fit the 3 classes of .*checkpoint.pth: give one name a class"),
    (["--top", "0"], "--top 0 must be at least 1"), (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
    (["--device", "tpu"], "--device tpu must be cpu, cuda or cuda:N, the N-th GPU counted from 0"),
    (["--output", "nowhere/p.csv"], "Cannot write nowhere/p.csv .* or choose another --output"),
])  # fmt: skip
def test_bad_input_is_one_sentence(tree, file, words, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        predict.main([str(tree / "val/class0/c0_0.png"), "--checkpoint", str(file), *words])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag, value", [("model", 5), ("input_size", "48"), ("input_size", 10**5), ("data_set", [])])
def test_flags_of_a_checkpoint_that_are_none_are_named(file, tmp_path, flag, value):
    content = checkpoint.read(file)
    setattr(content["args"], flag, value)
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=rf"a.pth is damaged or no checkpoint of ours.*args\['{flag}'\] is"):
        pretrained.load(tmp_path / "a.pth")


def test_class_names_that_are_a_fifo_do_not_block(file, tmp_path):
    os.mkfifo(tmp_path / "names")
    with pytest.raises(ValueError, match=r"Cannot read --classes .*names \(it is not a regular file\)"):
        predict.main(["x.png", "--checkpoint", str(file), "--classes", str(tmp_path / "names")])


@pytest.mark.parametrize("which", ["an image", "an image below a folder", "a link", "the checkpoint", "the names"])
def test_output_over_an_input_is_refused_before_anything_is_read(tmp_path, monkeypatch, which):
    image, link = draw(tmp_path / "in/a.png"), tmp_path / "link.png"
    link.symlink_to("in/a.png")
    weights, names = tmp_path / "a.pth", tmp_path / "names.txt"
    for file in (weights, names):
        file.write_text("not read")
    output = {"an image": image, "an image below a folder": f"{tmp_path}/in/../in/a.png", "a link": link,
              "the checkpoint": weights, "the names": names}[which]  # fmt: skip
    inputs = [tmp_path / "in"] if which == "an image below a folder" else [tmp_path / "none.png", image]
    before = {path: path.read_bytes() for path in (image, weights, names)}
    monkeypatch.setattr(pretrained, "from_flags", None)
    words = [*map(str, inputs), "--checkpoint", str(weights), "--classes", str(names), "--output", str(output)]
    with pytest.raises(ValueError, match=f"^--output {output} would replace the input .*: choose another file.$"):
        predict.main(words)
    assert {path: path.read_bytes() for path in before} == before and link.is_symlink()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/null")])
def test_an_output_that_is_no_regular_file_is_not_replaced(file, tmp_path, make):
    image, output = draw(tmp_path / "a.png"), tmp_path / "output"
    make(output)
    before = os.lstat(output)
    with pytest.raises(ValueError, match=f"^--output {output} is no regular file: choose another file"):
        predict.main([str(image), "--checkpoint", str(file), "--output", str(output)])
    assert os.path.samestat(os.lstat(output), before)


def test_an_output_of_an_earlier_run_is_replaced(tree, file, tmp_path):
    output = tmp_path / "p.csv"
    output.write_text("old")
    assert predict.main([str(tree / "val/class0"), "--checkpoint", str(file), "--output", str(output)]) == 0
    assert len(rows(output.read_text())) == 15


class Broken(torch.nn.Module):
    """Two classes; the sums of the streams' logits overflow where the image is bright."""

    def forward(self, images):
        bright = images.mean((1, 2, 3)) > 0
        return [torch.where(bright, torch.inf, 1.0)[:, None] * torch.tensor([1.0, 2.0])] * 2


@pytest.mark.parametrize("style", ["csv", "json"])
def test_an_image_without_finite_probabilities_is_named_and_left_out(file, tmp_path, capsys, monkeypatch, style):
    for name, level in (("a.png", 0), ("b.png", 255), ("c.png", 0)):
        draw(tmp_path / name, (level,) * 3)
    loaded = pretrained.load(file)
    broken = pretrained.Pretrained(Broken(), "", 2, 48, ["dark", "darker"], "", {})
    monkeypatch.setattr(pretrained, "load", lambda *_: broken)
    monkeypatch.setattr(pretrained.Pretrained, "view", loaded.view)
    assert predict.main([str(tmp_path), "--checkpoint", "x", "--batch-size", "2", "--format", style]) == 1
    printed = capsys.readouterr()
    assert printed.err == (
        f"predict.py: The network's probabilities for {tmp_path}/b.png are not finite: check its weights.\n"
    )
    if style == "json":
        found = {row["path"]: row["top"][0]["probability"] for row in json.loads(printed.out)}
    else:
        found = {row["path"]: float(row["probability"]) for row in rows(printed.out) if row["rank"] == "1"}
    certain = 1 / (1 + math.exp(-2))  # logits of 2 and 4
    assert found == {f"{tmp_path}/{name}": pytest.approx(certain, abs=1e-6) for name in ("a.png", "c.png")}


def test_json_has_no_nan():
    with pytest.raises(ValueError, match="JSON"):
        predict.as_text([("a.png", [("cat", math.nan)])], "json")


@pytest.mark.parametrize("style", ["csv", "json"])
def test_names_are_escaped_on_a_terminal_and_kept_elsewhere(tree, file, tmp_path, capsys, monkeypatch, style):
    names = ["a\x9b2J", "b\x1b[1m", "c\u202e"]
    (tmp_path / "names.txt").write_text("\n".join(names), encoding="utf-8")
    words = [str(tree / "val/class0/c0_0.png"), "--checkpoint", str(file), "--classes", str(tmp_path / "names.txt")]
    words += ["--format", style]
    predict.main(words)
    raw = capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    predict.main(words)
    shown = capsys.readouterr().out
    assert "\x9b" in raw and shown == raw.replace("\x9b", r"\x9b").replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
    predict.main([*words, "--output", str(tmp_path / "p")])
    assert (tmp_path / "p").read_text(encoding="utf-8") == raw
    assert predict.main([str(tmp_path / "x\x1b.png"), *words]) == 1
    assert rf"predict.py: Cannot read the image {tmp_path}/x\x1b.png: " in capsys.readouterr().err


@pytest.mark.parametrize("change, words, message", [
    (lambda c: c["model"], {}, "a.pth does not say which network it is of: name it with --model"),
    (lambda c: c["model"], {"name": "Semifomer_x"}, "Unknown --model 'Semifomer_x'"),
    (lambda c: c["model"], {"name": "resnet18"}, "of another network than resnet18, because it has no fc.weight"),
    (lambda c: {"model": c["model"], "args": c["args"]}, {"ema": True}, "a.pth holds no averaged weights"),
])  # fmt: skip
def test_a_file_that_does_not_tell_is_named(file, tmp_path, change, words, message):
    torch.save(change(checkpoint.read(file)), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        pretrained.load(tmp_path / "a.pth", **words)


def test_a_folder_without_images_and_a_missing_file_end_with_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="There is no image below .*: name image files or"):
        predict.paths_of([tmp_path])
    (tmp_path / "1.heic").write_text("")
    with pytest.raises(ValueError, match="no image below .* but 1 .heic, whose format is not read here: name image"):
        predict.paths_of([tmp_path])
    (done,) = forked(ROOT / "predict.py", "x.png", "--checkpoint", tmp_path / "none.pth")
    printed = f"predict.py: error: There is no checkpoint {tmp_path}/none.pth.\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", printed)
