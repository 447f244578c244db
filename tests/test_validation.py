"""A damaged or hostile training state is refused, by file and key, before any of it is used."""

import argparse
from copy import deepcopy

import pytest
import torch
from torch import nn

from tests.equality import same
from tests.test_checkpoint import advance, state_of
from tests.trees import parse
from training import checkpoint, optimization, validation


def content_of(state=None):
    state = state or state_of()
    advance(state, 2)
    return deepcopy(state.to_dict(argparse.Namespace(lr=1e-3, opt_betas=[0.9, 0.95])))


def one_element():
    return torch.zeros(300)[7:8]


# (place in the content, value, words of the message)
HOSTILE = [
    ("epoch", "3", "epoch is '3', not a whole number"),
    ("epoch", 2.5, "epoch is 2.5"),
    ("epoch", float("nan"), "epoch is nan"),
    ("epoch", None, "epoch is None"),
    ("epoch", -5, "epoch is -5"),
    ("epoch", True, "epoch is True"),
    ("epoch", torch.tensor(3), "epoch is a tensor of shape ()"),
    ("best", {}, "best is {}"),
    ("best", {"acc1": float("nan"), "epoch": 1}, "best is"),
    ("best", {"acc1": 101.0, "epoch": 1}, "best is"),
    ("best", {"acc1": 50.0, "epoch": "1"}, "best is"),
    ("classes", ["a", 5], "classes is"),
    ("classes", "ab", "classes is 'ab'"),
    ("bad_images", {"labelled": [-1]}, "bad_images is"),
    ("bad_images", {"labelled": 3}, "bad_images is"),
    ("bad_images", [1], "bad_images is"),
    ("pending", {"loss": "low"}, "pending is"),
    ("pending", {"loss": float("inf")}, "pending is"),
    ("scaler", {"scale": 1.0}, "scaler is"),
    ("scaler", 7, "scaler is 7"),
    ("lr_scheduler", None, "lr_scheduler is None"),
    ("lr_scheduler", {"metric": one_element()}, "lr_scheduler is"),
    ("plateau", {"best": 1.0}, "plateau is"),
    ("args", ["--lr", 1], "args is"),
    ("args", {"__class__": 1}, "args has '__class__', which is no flag's name"),
    ("args", {"lr": {"x": 1}}, "args['lr'] is"),
    ("args", {"a b": 1}, "args has 'a b'"),
    ("model_ema", 5, "model_ema is 5, not a state dict"),
    ("model_ema/fc.bias", "x", "model_ema['fc.bias'] is 'x', not a tensor"),
    ("model_ema/fc.bias", torch.full((3,), torch.nan), "model_ema['fc.bias'] is not finite"),
    ("model_ema/fc.bias", torch.zeros(4), "The head in a.pth (model_ema) has 4 classes"),
    ("model_ema/body.bias", torch.zeros(4), "a.pth (model_ema) is of another network: body.bias is (4,) there"),
    ("model_ema/fc.bias", torch.zeros(3, dtype=torch.float64), "torch.float64 there, torch.float32 here"),
    ("model", [], "model is [], not a state dict"),
    ("model/fc.bias", torch.zeros(3).to_sparse(), "model['fc.bias'] is a tensor of torch.float32, torch.sparse_coo"),
    ("model/fc.bias", torch.zeros(3, device="meta"), "on meta"),
    ("model/fc.bias", torch.zeros(3, dtype=torch.complex64), "complex64"),
    ("model/fc.bias", torch.zeros(1).expand(3), "has 3 elements, but the file holds fewer"),
    ("model/fc.bias", torch.zeros(9)[::3], "is a view of another tensor, shape (3,), stride (3,)"),
    ("model/fc.bias", torch.tensor([1.0, torch.inf, 0.0]), "model['fc.bias'] is not finite"),
    ("optimizer", [], "optimizer is [], not an optimizer's state"),
    ("optimizer/state", [], "optimizer is"),
    ("optimizer/state/0", 5, "optimizer['state'][0] is 5"),
    ("optimizer/state/99", {}, "optimizer['state'][99] is {}"),
    ("optimizer/state/0/exp_avg", torch.zeros(3), "['exp_avg'] is (3,) torch.float32, not (5, 4) torch.float32"),
    ("optimizer/state/0/exp_avg", one_element(), "state[0]['exp_avg'] is (1,)"),
    ("optimizer/state/0/exp_avg", torch.zeros(5, dtype=torch.int64), "torch.int64, not (5, 4) torch.float32"),
    ("optimizer/state/0/exp_avg", torch.zeros(5, device="meta"), "on meta"),
    ("optimizer/state/0/exp_avg", torch.zeros(5).to_sparse(), "sparse"),
    ("optimizer/state/0/exp_avg", torch.zeros(1).expand(5), "holds fewer"),
    ("optimizer/state/0/exp_avg", torch.zeros(10)[::2], "is a view of another tensor"),
    ("optimizer/state/0/exp_avg", torch.full((5,), torch.inf), "['exp_avg'] is not finite"),
    ("optimizer/state/0/exp_avg", "x", "is 'x', not (5, 4) torch.float32"),
    ("optimizer/state/0/exp_avg", None, "is None, not (5, 4)"),
    ("optimizer/state/0/exp_avg_sq", torch.full((5, 4), -1.0), "['exp_avg_sq'] is a mean of squares below 0"),
    ("optimizer/state/0/step", torch.full((), torch.nan), "['step'] is not finite"),
    ("optimizer/state/0/step", torch.zeros(5), "is (5,) torch.float32, not () torch.float32"),
    ("optimizer/state/0/more", torch.zeros(5), "state[0] has ['exp_avg', 'exp_avg_sq', 'more', 'step'], not"),
    ("optimizer/state/0", {}, "state[0] has [], not ['exp_avg'"),
    ("optimizer/param_groups", [], "optimizer['param_groups'] is []"),
    ("optimizer/param_groups/0/params", [0, 0, 1], "twice the same"),
    ("optimizer/param_groups/0/params", ["0"], "no numbers"),
    ("optimizer/param_groups/0/params", [0, 1, 2, 3, 4, 5, 6], "groups of [7"),
    ("optimizer/param_groups/0/lr", "fast", "is 'fast', not a learning rate"),
    ("optimizer/param_groups/0/lr", float("nan"), "is nan, not a learning rate"),
    ("optimizer/param_groups/0/lr_scale", "low", "is 'low', not a learning rate"),
    ("optimizer/param_groups/0/betas", object, "betas'] is <class 'object'>"),
]  # fmt: skip


def changed(content, place, value):
    *folders, last = [int(part) if part.isdigit() else part for part in place.split("/")]
    for part in folders:
        content = content[part]
    content[last] = value


@pytest.mark.parametrize("place, value, words", HOSTILE)
def test_a_hostile_entry_is_named_and_nothing_is_used(place, value, words):
    content, state = content_of(), state_of(seed=4)
    changed(content, place, value)
    before = deepcopy(state.model.state_dict())
    with pytest.raises(ValueError) as caught:
        state.from_dict(content, "a.pth")
    assert "a.pth" in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)
    assert state.epoch == -1 and (same(state.model.state_dict(), before) or "optimizer state" in str(caught.value))


def test_a_list_that_contains_itself_and_one_nested_without_end_are_refused():
    for_ever = []
    for_ever.append(for_ever)
    deep = []
    for _ in range(100_000):
        deep = [deep]
    laughs = [0.0] * 10
    for _ in range(30):
        laughs = [laughs] * 10
    for value in (for_ever, deep, laughs):
        content = content_of()
        content["optimizer"]["state"][0]["exp_avg"] = value
        with pytest.raises(ValueError, match="a.pth"):
            state_of().from_dict(content, "a.pth")


def test_no_tensor_of_the_file_becomes_one_of_the_optimizer():
    """Moments in another memory order are copied into that of the parameter, and none shares memory with another."""
    content, state = content_of(), state_of(seed=4)
    saved = content["optimizer"]["state"]
    weight = next(index for index, each in saved.items() if each["exp_avg"].shape == (5, 4))
    saved[weight]["exp_avg"] = torch.arange(20.0).view(4, 5).t()
    saved[weight]["exp_avg_sq"] = saved[weight]["exp_avg"]
    state.from_dict(content, "a.pth")
    restored = state.optimizer.state_dict()["state"][weight]
    assert torch.equal(restored["exp_avg"], torch.arange(20.0).view(4, 5).t())
    assert restored["exp_avg"].is_contiguous() and restored["exp_avg"].data_ptr() != restored["exp_avg_sq"].data_ptr()


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lamb", "lookahead_adamw", "nadam", "lion", "adafactor", "radam",
                                 "adan", "muon", "kron"])  # fmt: skip
@torch.compiler.set_stance("force_eager")  # Kron compiles its step, which takes a minute
def test_every_kind_of_optimizer_goes_on_to_the_bit(opt):
    def build():
        state = state_of()
        state.optimizer = optimization.build_optimizer(parse("--opt", opt, "--lr", 0.01), state.model)
        state.scheduler = optimization.build_scheduler(parse("--epochs", 9, "--lr", 0.01), state.optimizer)
        return state

    def train(state, seed):
        torch.manual_seed(seed)  # Kron draws from the global generator
        advance(state, 8)

    whole, first, second = build(), build(), build()
    train(whole, 0), train(first, 0)
    second.from_dict(deepcopy(first.to_dict(None)), "a.pth")
    train(whole, 1), train(second, 1)
    assert same(whole.model.state_dict(), second.model.state_dict())
    assert same(whole.optimizer.state_dict(), second.optimizer.state_dict())


def test_steps_counted_in_plain_numbers_are_taken():
    content, state = content_of(), state_of(seed=4)
    for each in content["optimizer"]["state"].values():
        each["step"] = int(each["step"])
    state.from_dict(content, "a.pth")
    assert {float(each["step"]) for each in state.optimizer.state_dict()["state"].values()} == {2.0}


def test_parameters_without_a_moment_begin_anew():
    content, state = content_of(), state_of(seed=4)
    del content["optimizer"]["state"][0]
    state.from_dict(content, "a.pth")
    assert set(state.optimizer.state_dict()["state"]) == set(content["optimizer"]["state"])


def test_not_finite_finds_the_first_of_nested_values():
    good, bad = torch.ones(3), torch.tensor([0.0, -torch.inf])
    assert validation.not_finite({"a": [good, 1.0, "x", None, torch.tensor([1, 2])]}) == ""
    assert validation.not_finite({"a": [good, {"b": bad}]}) == "['a'][1]['b']"
    assert validation.not_finite({"a": (1.0, float("nan"))}) == "['a'][1]"


@pytest.mark.parametrize("about, words", [
    ({"args": {"__class__": 1}}, "'__class__', which is no flag's name"), ({"args": [1]}, "args is"),
    ({"epoch": "x"}, "epoch is 'x'"), ({"classes": [1]}, "classes is"), ([1], "and no training state"),
])  # fmt: skip
def test_the_metadata_of_safetensors_are_judged_likewise(tmp_path, about, words):
    path = tmp_path / "model.safetensors"
    checkpoint.save_safetensors(state_of().model.state_dict(), about, path)
    with pytest.raises(ValueError, match="model.safetensors") as caught:
        checkpoint.read(path)
    assert words in str(caught.value)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    import zipfile

    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(50_000_000))
    assert path.stat().st_size < 100_000
    with pytest.raises(ValueError, match="bomb.pth, it is damaged .*: its entries are larger than the file"):
        checkpoint.read(path)


def test_weights_to_start_from_must_be_finite_and_may_be_views():
    whole = nn.Linear(4, 5).state_dict()
    assert checkpoint.weights_in({"model": {**whole, "bias": torch.zeros(10)[::2]}}, "a.pth")
    for value, words in ((torch.full((5,), torch.nan), "is not finite"), (torch.zeros(5, device="meta"), "on meta")):
        with pytest.raises(ValueError, match=rf"a.pth cannot be used: model\['bias'\] {words}|{words}"):
            checkpoint.weights_in({**whole, "bias": value}, "a.pth")
