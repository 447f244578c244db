"""script/show_views.py: which views of which images a sheet has, that their colours are the image's, and bad input."""

import numpy as np
import pytest
from PIL import Image

from options import get_args_parser
from script import show_views
from tests.trees import draw, make_cifar, make_fashion, make_tree

STRONG = ["strong 1", "strong 2", "strong 3"]
ALL = ["evaluation", "labelled", "weak", *STRONG]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = make_tree(tmp_path_factory.mktemp("tree"), classes=2, train=4, val=1, labelled=2)
    for i in range(3):
        draw(root / "others" / f"{i}.png", (0, 0, 255), size=(60, 60))
    return root


def flags(root, *more):
    return ["--data-set", "SEMI-IMNET", "--data-path", root, "--data-split-file", root / "labelled.txt",
            "--input-size", 40, "--images", 3, *more]  # fmt: skip


def read(*words):
    parser = get_args_parser()
    parser.add_argument("--images", type=int)
    return show_views.read(parser.parse_args([str(word) for word in words]))


def labelled_pixels(root):
    """{class: centre crops of its two labelled images}: 40 rows and 48 columns, resized to 45 rows, cropped to 40."""
    crops = {}
    for name in ("class0", "class1"):
        images = [Image.open(root / "train" / name / f"c{name[-1]}_{i}.png") for i in range(2)]
        crops[name] = [np.asarray(image.resize((54, 45), Image.BICUBIC))[2:42, 7:47] / 255 for image in images]
    return crops


@pytest.mark.parametrize("backend, levels", [("pil", 0.01), ("fast", 3)])
def test_the_evaluation_view_is_the_image_and_the_others_are_drawn_anew(tree, backend, levels):
    rows, crops = read(*flags(tree), "--data-backend", backend), labelled_pixels(tree)
    assert len(rows) == 3
    for name, views in rows:
        assert list(views) == ALL and all(view.shape == (40, 40, 3) for view in views.values())
        assert min(np.abs(views["evaluation"] - crop).max() for crop in crops[name]) < levels / 255
        assert len({view.tobytes() for view in views.values()}) == 6
        assert all(0 <= view.min() and view.max() <= 1 for view in views.values())
    again, other = (read(*flags(tree, "--data-backend", backend, "--seed", seed)) for seed in (0, 1))
    assert all(np.array_equal(views[t], same[t]) for (_, views), (_, same) in zip(rows, again) for t in ALL)
    assert not np.array_equal(rows[0][1]["strong 1"], other[0][1]["strong 1"])


def test_what_training_does_not_see_is_not_shown(tree):
    assert [list(views) for _, views in read(*flags(tree, "--supervise-only"))] == [["evaluation", "labelled"]] * 3
    rows = read(*flags(tree, "--unlabelled-path", tree / "others", "--aa", "", "--reprob", 0, "--color-jitter", 0))
    assert [name for name, _ in rows[2:]] == ["unlabelled"] and {name for name, _ in rows[:2]} <= {"class0", "class1"}
    assert list(rows[0][1]) == ALL and list(rows[2][1]) == ["evaluation", "weak", *STRONG]
    for view in rows[2][1].values():
        assert np.allclose(view, [0, 0, 1], atol=1e-6)  # all that was cropped is blue, as the file


def test_data_sets_with_colours_of_their_own(tmp_path):
    make_fashion(tmp_path)
    arrays = make_cifar(tmp_path, "CIFAR10", classes=("cat",))
    images = np.concatenate([arrays[f"data_batch_{i}"] for i in range(1, 6)]).reshape(-1, 3, 32, 32)
    shown = ["--data-path", tmp_path, "--images", 2, "--input-size", 32]
    for name, views in read("--data-set", "CIFAR10", *shown):
        view = views["evaluation"].transpose(2, 0, 1)
        assert name == "cat" and list(views) == ALL
        assert min(np.abs(view - image / 255).max() for image in images) < 1e-6
    (name, views), _ = read("--data-set", "FASHION", *shown)
    assert name in ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                    "Ankle boot")  # fmt: skip
    assert np.allclose(views["evaluation"], views["evaluation"][..., :1], atol=1e-6)


def main(*words):
    show_views.main([str(word) for word in words])


def test_the_sheet(tree, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(show_views, "DPI", 30)
    main(*flags(tree, "--unlabelled-path", tree / "others", "--output", tmp_path / "sheet.png"))
    assert capsys.readouterr().out == f"Drew 3 image(s) in {tmp_path / 'sheet.png'}\n"
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size[0] == 249 and image.size[1] > 100
    with pytest.raises(SystemExit):
        main("--help")
    printed = capsys.readouterr().out
    assert all(flag in printed for flag in ("--images N", "--output FILE", "--data-set", "--aa NAME", "--seed"))


@pytest.mark.parametrize("words, error", [
    (["--images", 0], "--images 0 must be from 1 to 50."),
    (["--images", 5], "--images asks for 5 labelled images, but there are 4: lower it."),
    (["--output", "sheet.jpg"], "--output sheet.jpg is not the name of a PNG file: end it in .png."),
    (["--data-path", "nowhere"], "There is no folder nowhere/train"),
    (["--data-split-file", "none.txt"], "none.txt"),
    (["--remode", "x"], "Unknown --remode 'x'"),
    (["--output", "none/sheet.png"], "--output none/sheet.png: No such file or directory; choose a place"),
])  # fmt: skip
def test_bad_input_is_one_sentence(tree, monkeypatch, tmp_path, words, error):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(show_views, "DPI", 30)
    with pytest.raises(SystemExit) as stop:
        main(*flags(tree, *words))
    assert stop.value.code.startswith("show_views.py: error: ") and error in stop.value.code
    assert "\n" not in stop.value.code


def test_without_matplotlib(tree, monkeypatch):
    monkeypatch.setattr(show_views, "Figure", None)
    with pytest.raises(SystemExit, match="^show_views.py: error: matplotlib is not installed: pip install matplotlib"):
        main(*flags(tree))
