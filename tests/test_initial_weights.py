"""Start-up files: each gives exactly what its flag promises, or says what is in the way."""

import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from torch.nn import functional as F

import options
import semi_main
import utils
from models import build_model
from models.pretrained import hosted_weights
from tests.trees import ROOT, forked, make_tree, ranks
from training.initial_weights import initial_weight_files, load_initial_weights

TINY, PE = "Semiformer_tiny_patch16", "Semiformer_PE_small_patch16"
FILES = {"--finetune": "--finetune FILE"} | {
    f"--{name}-load": f"--{name}-load --{name}-load-file FILE"
    for name in ("dino", "semiformer", "resnet", "warmup-model")
}


pytestmark = pytest.mark.usefixtures("one_thread")


def parse(line):
    return options.get_args_parser().parse_args(line.split())


def network(name=TINY, classes=3, seed=0, **settings):
    torch.manual_seed(seed)
    return build_model(name, classes, **settings)


def noisy(model, seed=9):
    """A state dict no tensor of which is a fresh network's; counts of batches are 7."""
    torch.manual_seed(seed)
    return {
        key: torch.randn_like(value) if value.is_floating_point() else torch.full_like(value, 7)
        for key, value in model.state_dict().items()
    }


def vit(depth=12, **settings):
    return noisy(timm.create_model("vit_tiny_patch16_224", depth=depth, num_classes=5, **settings))


def load(flag, content, model, folder):
    """Save the content, load it under the flag, and return {key: whether it changed} of the model."""
    path = folder / "start.pth"
    torch.save(content, path)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    load_initial_weights(parse(FILES[flag].replace("FILE", str(path))), model)
    return {key: not torch.equal(value, before[key]) for key, value in model.state_dict().items()}


def refused(flag, content, model, folder, words):
    """The load is an error with flag, file and these words, and leaves the network as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load(flag, content, model, folder)
    for word in (flag, str(folder / "start.pth"), *words):
        assert word in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def without(weights, *keys):
    return {key: value for key, value in weights.items() if key not in keys}


# -------------------------------------------------------------------------------- finetune


@pytest.mark.parametrize("wrapped", [True, False])
def test_finetune_takes_everything(tmp_path, wrapped, capsys):
    model, weights = network("deit_tiny_patch16_224"), noisy(network("deit_tiny_patch16_224"))
    changed = load("--finetune", {"model": weights, "epoch": 3} if wrapped else weights, model, tmp_path)
    assert all(changed.values()) and all(torch.equal(model.state_dict()[key], weights[key]) for key in weights)
    assert model.training
    said = capsys.readouterr().out
    assert said == f"--finetune {tmp_path / 'start.pth'}: {len(weights)} of {len(weights)} tensors taken.\n"


@pytest.mark.parametrize(
    "name, heads",
    [
        ("deit_tiny_patch16_224", {"head.weight", "head.bias"}),
        ("resnet18", {"fc.weight", "fc.bias"}),
        ("myresnet50", {"model.fc.weight", "model.fc.bias"}),
        (TINY, {f"{stream}_cls_head.{part}" for stream in ("conv", "trans") for part in ("weight", "bias")}),
    ],
)
def test_finetune_drops_heads_of_another_shape_and_says_so(tmp_path, name, heads, capsys):
    model, weights = network(name, 3), noisy(network(name, 5))
    changed = load("--finetune", weights, model, tmp_path)
    assert {key for key in changed if not changed[key]} == heads
    assert all(torch.equal(model.state_dict()[key], weights[key]) for key in weights if key not in heads)
    said = capsys.readouterr().out
    assert said.count(", ".join(key for key in weights if key in heads)) == 2  # left as they were; not used


def test_finetune_drops_only_the_head_that_differs(tmp_path):
    weights = noisy(network(classes=3))
    weights |= {"conv_cls_head.weight": torch.ones(5, 256), "conv_cls_head.bias": torch.ones(5)}
    changed = load("--finetune", weights, network(classes=3), tmp_path)
    assert {key for key in changed if not changed[key]} == {"conv_cls_head.weight", "conv_cls_head.bias"}


@pytest.mark.parametrize("size", [96, 288])
def test_finetune_resizes_deits_positions_behind_the_class_token(tmp_path, size, capsys):
    model, weights = network("deit_tiny_patch16_224", img_size=size), noisy(network("deit_tiny_patch16_224"))
    load("--finetune", weights, model, tmp_path)
    side, old = size // 16, weights["pos_embed"]
    grid = old[:, 1:].reshape(1, 14, 14, 192).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.pos_embed.data[:, 1:], grid.permute(0, 2, 3, 1).reshape(1, side * side, 192))
    assert torch.equal(model.pos_embed.data[:, :1], old[:, :1])
    assert f"pos_embed resized from 14x14 to {side}x{side}." in capsys.readouterr().out
    assert model.eval()(torch.randn(1, 3, size, size))[0].shape == (1, 3)


def test_finetune_resizes_the_pe_variants_positions_all_of_them(tmp_path):
    model = network(PE)
    weights = noisy(model) | {"pos_embed": torch.randn(1, 49, 384)}
    load("--finetune", weights, model, tmp_path)
    grid = weights["pos_embed"].reshape(1, 7, 7, 384).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(14, 14), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.pos_embed.data, grid.permute(0, 2, 3, 1).reshape(1, 196, 384))


def test_finetune_refuses_what_does_not_fit(tmp_path):
    model = network("deit_tiny_patch16_224")
    weights = noisy(model)
    for content, words in (
        (without(weights, "norm.bias"), ["lacks 1 tensors", "['norm.bias']"]),
        (without(weights, "head.bias"), ["lacks 1 tensors", "head.bias"]),
        (weights | {"dist_token": torch.zeros(1, 1, 192)}, ["1 others", "['dist_token']"]),
        (weights | {"norm.bias": torch.zeros(7, 1)}, ["norm.bias is (7, 1) there, (192,) here"]),
        (weights | {"pos_embed": torch.zeros(1, 197, 7)}, ["pos_embed is (1, 197, 7) there"]),
        (weights | {"pos_embed": torch.zeros(1, 198, 192)}, ["197 to 196 patches", "no two square grids"]),
        (noisy(network("resnet18")), ["is of another network"]),
        ({"epoch": 3}, ["holds no state dict"]),
    ):
        refused("--finetune", content, model, tmp_path, words)


# -------------------------------------------------------------------------------- encoders without a head


def encoder(**settings):
    """The tensors of a ViT of two blocks without a head."""
    return without(vit(depth=2, **settings), "head.weight", "head.bias")


def prefixed(prefix, weights):
    return {prefix + key: value for key, value in weights.items()}


PROJECTION = {"head.mlp.0.weight": torch.ones(2, 2), "head.last_layer.weight_g": torch.ones(2, 1)}
DECODER = {
    "mask_token": torch.ones(1, 1, 8),
    "decoder_pos_embed": torch.ones(1, 3, 8),
    "decoder_blocks.0.b": torch.ones(8),
}
HEADLESS = {
    "bare": lambda e: e,
    "MAE": lambda e: {"model": e},
    "MAE with its decoder": lambda e: {"model": e | DECODER},
    "timm": lambda e: {"state_dict": e, "epoch": 3},
    "timm in DDP": lambda e: {"state_dict": prefixed("module.", e)},
    "DINO, teacher and student": lambda e: {
        "student": prefixed("module.backbone.", noisy_like(e)) | prefixed("module.", PROJECTION),
        "teacher": prefixed("backbone.", e) | PROJECTION,
    },
    "DINO, student alone": lambda e: {"student": prefixed("module.backbone.", e) | prefixed("module.", PROJECTION)},
    "DINOv2": lambda e: e | {"mask_token": torch.ones(1, 192)},
    "DINOv2, teacher": lambda e: {
        "teacher": prefixed("backbone.", e)
        | {f"{head}_{key}": x for head in ("dino", "ibot") for key, x in PROJECTION.items()}
    },
    "DINOv2, sharded": lambda e: {
        "model": prefixed("student.backbone.", noisy_like(e)) | prefixed("teacher.backbone.", e)
    },
    "an encoder": lambda e: {"model": prefixed("encoder.", e)},
}


def noisy_like(weights):
    return {key: torch.randn_like(value) for key, value in weights.items()}


@pytest.mark.parametrize("kind", HEADLESS)
def test_finetune_takes_encoders_without_a_head(tmp_path, kind, capsys):
    scaled = dict(init_values=1e-5) if "DINOv2" in kind else {}  # blocks.*.ls1.gamma
    model, weights = network("vit_tiny_patch16_224", depth=2, **scaled), encoder(**scaled)
    changed = load("--finetune", HEADLESS[kind](weights), model, tmp_path)
    assert {key for key in changed if not changed[key]} == {"head.weight", "head.bias"}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())
    said = capsys.readouterr().out
    assert f"{len(weights)} of {len(weights) + 2} tensors taken; left as they were: head.weight, head.bias" in said
    assert " has no head: the network's own stays, drawn anew unless an earlier flag has loaded it.\n" in said
    assert ("not used: " in said) == ("decoder" in kind or "DINO" in kind)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "deit_tiny_distilled_patch16_224", TINY, "conv_micro"])
def test_finetune_takes_every_network_that_was_saved_without_classes(tmp_path, name):
    """Of ConvNeXt, head.norm is no part of the classifier; a distilled DeiT and a Semiformer have two."""
    weights = noisy(timm.create_model(name, num_classes=0))
    model = network(name, 3)
    changed = load("--finetune", weights, model, tmp_path)
    assert {key for key in changed if not changed[key]} == set(changed) - set(weights) and len(changed) > len(weights)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())


def test_the_norm_of_the_mean_of_tokens_begins_anew(tmp_path, capsys):
    """As in MAE, whose encoder normalises all tokens and whose fine-tuned network their mean."""
    model, weights = network("vit_base_patch16_clsgap_224", depth=2, embed_dim=192, num_heads=3), encoder()
    changed = load("--finetune", {"model": weights}, model, tmp_path)
    assert {key for key in changed if not changed[key]} == {
        "head.weight",
        "head.bias",
        "fc_norm.weight",
        "fc_norm.bias",
    }
    assert "not used: norm.weight, norm.bias." in capsys.readouterr().out
    fine_tuned = noisy(model, 3)
    assert all(load("--finetune", {"model": fine_tuned}, model, tmp_path).values())
    refused("--finetune", without(fine_tuned, "fc_norm.bias"), model, tmp_path, ["lacks 1 tensors", "['fc_norm.bias']"])


def test_the_mean_is_of_the_patch_tokens():
    model = network("vit_base_patch16_clsgap_224", depth=2, img_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = model.forward_features(images)
        features = F.layer_norm(tokens[:, 1:].mean(1), (768,), model.fc_norm.weight, model.fc_norm.bias, 1e-6)
        assert tokens.shape == (2, 5, 768)
        torch.testing.assert_close(model(images)[0], features @ model.head.weight.T + model.head.bias)


def test_finetune_refuses_encoders_that_do_not_fit(tmp_path):
    model, weights = network("vit_tiny_patch16_224", depth=2), encoder()
    for content, words in (
        (encoder(embed_dim=384, num_heads=6), ["cls_token is (1, 1, 384) there, (1, 1, 192) here"]),
        ({"teacher": without(weights, "norm.bias")}, ["(teacher)", "lacks 1 tensors", "['norm.bias']"]),
        ({"model": weights | {"predictor.weight": torch.ones(1)}}, ["1 others", "['predictor.weight']"]),
        (weights | {"register_tokens": torch.ones(1, 4, 192)}, ["1 others", "['register_tokens']"]),
        (weights | prefixed("backbone.", weights), ["holds cls_token twice, once as backbone.cls_token"]),
        (without(vit(depth=3), "head.weight", "head.bias"), ["12 others", "blocks.2."]),
        ({"teacher": {"cls_token": "x"}}, ["(teacher)", "holds no state dict", "'teacher'"]),
        ({"student": [weights]}, ["holds no state dict"]),
        ({"teacher": {"cls_token": torch.full((1,), torch.nan)}}, ["teacher['cls_token'] is not finite"]),
    ):
        refused("--finetune", content, model, tmp_path, words)
    # Prefixes and entries mean something to --finetune alone.
    refused("--warmup-model-load", {"teacher": weights}, model, tmp_path, ["holds no state dict"])


def test_a_prefix_that_the_network_has_itself_is_none_of_a_wrapper(tmp_path):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)

        def get_classifier(self):
            return self.head

    model = Wrapped()
    weights = noisy(model)
    assert all(load("--finetune", prefixed("module.", weights), model, tmp_path).values())
    assert all(torch.equal(model.state_dict()[key], weights[key]) for key in weights)


# -------------------------------------------------------------------------------- hosted weights


@pytest.fixture
def hosted(monkeypatch):
    """({Hugging Face's name: state dict} of what timm can download in this test, the names that it asks for)."""
    weights, asked = {}, []

    def download(name, *_, **__):
        asked.append(name)
        if name not in weights:
            raise FileNotFoundError("An error happened while trying to locate the file on the Hub.\nPlease retry.")
        return {key: value.clone() for key, value in weights[name].items()}

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)
    return weights, asked


HUB = "timm/resnet10t.c3_in1k"


def test_pretrained_takes_everything_but_a_head_of_other_classes(hosted, tiny, capsys):
    weights, asked = hosted
    weights[HUB] = noisy(network("resnet10t", 1000))
    utils.seed_everything(0)
    before = semi_main.Run(parse(tiny), torch.device("cpu")).state.model.state_dict()
    assert asked == []
    utils.seed_everything(0)
    state = semi_main.Run(parse(f"{tiny} --pretrained"), torch.device("cpu")).state
    for key, value in state.model.state_dict().items():
        assert torch.equal(value, before[key] if key.startswith("fc.") else weights[HUB][key]), key
    assert all(map(torch.equal, state.ema.module.state_dict().values(), state.model.state_dict().values()))
    said = (
        f"{len(before) - 2} of {len(before)} tensors taken; left as they were: fc.weight, fc.bias; not used: fc.weight"
    )
    assert asked == [HUB] and f"--pretrained resnet10t: {said}" in capsys.readouterr().out


def test_pretrained_takes_a_head_of_the_same_classes_and_resizes_positions(hosted):
    weights, _ = hosted
    name = "timm/deit_tiny_patch16_224.fb_in1k"
    weights[name] = noisy(network("deit_tiny_patch16_224", 1000))
    args, model = (
        parse("--model deit_tiny_patch16_224 --pretrained"),
        network("deit_tiny_patch16_224", 1000, img_size=96),
    )
    load_initial_weights(args, model, hosted_weights(args.model, 96))
    own = model.state_dict()
    assert {key for key in own if not torch.equal(own[key], weights[name][key])} == {"pos_embed"}
    assert torch.equal(own["pos_embed"][:, 0], weights[name]["pos_embed"][:, 0]) and own["pos_embed"].shape[1] == 37


def test_pretrained_takes_an_encoder_without_a_head(hosted):
    weights, _ = hosted
    name = "timm/convnextv2_atto.fcmae"
    weights[name] = noisy(timm.create_model("convnextv2_atto", num_classes=0))
    taken = hosted_weights("convnextv2_atto.fcmae")
    assert set(taken) == set(weights[name]) and all(torch.equal(taken[key], weights[name][key]) for key in taken)


def test_a_file_comes_after_the_hosted_weights_and_a_checkpoint_before(hosted, tiny, tmp_path, capsys):
    weights, asked = hosted
    weights[HUB] = noisy(network("resnet10t", 1000))
    tuned = without(noisy(network("resnet10t", 2), 3), "fc.weight", "fc.bias")
    torch.save(tuned, tmp_path / "a.pth")
    state = semi_main.Run(parse(f"{tiny} --pretrained --finetune {tmp_path / 'a.pth'}"), torch.device("cpu")).state
    assert asked == [HUB] and all(torch.equal(state.model.state_dict()[key], tuned[key]) for key in tuned)
    resumed = noisy(network("resnet10t", 2), 5)
    torch.save(resumed, tmp_path / "b.pth")
    weights.clear()  # asked for again, it would be an error
    state = semi_main.Run(parse(f"{tiny} --pretrained --resume {tmp_path / 'b.pth'}"), torch.device("cpu")).state
    assert asked == [HUB] and all(torch.equal(state.model.state_dict()[key], resumed[key]) for key in resumed)


def test_hosted_weights_that_cannot_be_had_or_do_not_fit_are_one_sentence(hosted, tiny):
    weights, _ = hosted
    start = (
        "--pretrained: the weights that timm hosts for resnet10t can be had neither from its cache nor from the network"
    )
    end = ": start once where there is a network, or name a file by --finetune."
    with pytest.raises(OSError) as error:
        semi_main.Run(parse(f"{tiny} --pretrained"), torch.device("cpu"))
    assert str(error.value) == f"{start} (An error happened while trying to locate the file on the Hub.){end}"
    for damage in ({"bn1.bias": torch.zeros(7)}, {"more": torch.zeros(1)}):
        weights[HUB] = noisy(network("resnet10t", 1000)) | damage
        with pytest.raises(OSError, match=re.escape(f"{start} (Error(s) in loading state_dict for ResNet:){end}")):
            hosted_weights("resnet10t")


@pytest.mark.parametrize("name", [TINY, "myresnet50", "vit_base_patch16_clsgap_224", "vit_base_patch16_gap_224"])
def test_a_network_without_hosted_weights_is_named_before_any_data_is_read(name):
    message = f"--pretrained: no weights are hosted for {name}: leave it out, or name a file by --finetune."
    for refuse in (semi_main.main, lambda args: hosted_weights(args.model)):
        with pytest.raises(ValueError) as error:
            refuse(parse(f"--data-set IMNET --data-path nowhere --device cpu --pretrained --model {name}"))
        assert str(error.value) == message


def test_an_unknown_tag_of_hosted_weights_is_named():
    with pytest.raises(ValueError, match="^Unknown --model 'resnet18.nobody': Invalid pretrained tag"):
        build_model("resnet18.nobody", 2)


# semi_main.py where rank 1 has no network, and rank 0 has none either if FAULT is set.
OFFLINE = f"""
import os, runpy, sys
import timm, torch

def download(name, *_, **__):
    if os.environ["RANK"] == "1" or os.environ["FAULT"]:
        raise FileNotFoundError("no network")
    torch.manual_seed(5)
    return timm.create_model("lcnet_050").state_dict()

timm.models._builder.load_state_dict_from_hf = download
sys.argv[0] = {str(ROOT / "semi_main.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("fault", ["", "offline"])
def test_rank_0_downloads_for_all_or_all_stop_with_its_sentence(tmp_path, tiny, fault):
    (tmp_path / "offline.py").write_text(OFFLINE)
    words = f"{tiny} --model lcnet_050 --pretrained --dist_url file://{tmp_path}/meeting".split()
    environments = [{**env, "FAULT": fault} for env in ranks(2)]
    done = forked(tmp_path / "offline.py", *words, environments=environments, timeout=120)
    for rank, each in enumerate(done):
        assert each.returncode == (1 if fault else 0), each.stderr
        assert (
            not fault or f"[rank{rank}]: semi_main.py: error: --pretrained: the weights that timm hosts" in each.stderr
        )
        assert "Traceback" not in each.stderr
    assert fault or "--pretrained lcnet_050: " in done[0].stdout


# -------------------------------------------------------------------------------- dino


def stream(key):
    """Whether a two-stream network's tensor is one that --dino-load must fill."""
    return key == "cls_token" or key.startswith(("trans_1.", "trans_norm.")) or ".trans_block." in key


def test_dino_fills_the_transformer_stream_by_name(tmp_path, capsys):
    model, weights = network(), vit()
    changed = load("--dino-load", dict(reversed(weights.items())), model, tmp_path)  # order does not matter
    assert {key for key in changed if changed[key]} == {key for key in changed if stream(key)}
    own = model.state_dict()
    assert torch.equal(own["cls_token"], weights["cls_token"])
    assert torch.equal(own["trans_norm.weight"], weights["norm.weight"])
    for part in ("norm1.bias", "attn.qkv.weight", "attn.proj.bias", "norm2.weight", "mlp.fc1.weight", "mlp.fc2.bias"):
        assert torch.equal(own[f"trans_1.{part}"], weights[f"blocks.0.{part}"])
        for i in range(1, 12):
            assert torch.equal(own[f"conv_trans_{i + 1}.trans_block.{part}"], weights[f"blocks.{i}.{part}"])
    said = capsys.readouterr().out
    assert "147 of " in said  # class token, norm and 12 blocks of 12 tensors
    unused = said.partition("not used: ")[2]
    for key in ("head.bias", "patch_embed.proj.weight", "pos_embed"):
        assert key in unused


def test_dino_without_a_head_and_with_blocks_to_spare(tmp_path, capsys):
    weights = {key: value for key, value in vit(depth=14).items() if not key.startswith(("head.", "patch_embed."))}
    changed = load("--dino-load", weights, network(), tmp_path)
    assert {key for key in changed if changed[key]} == {key for key in changed if stream(key)}
    assert "not used: pos_embed, blocks.12.norm1.weight" in capsys.readouterr().out


def test_dino_gives_the_pe_variant_its_positions_without_the_class_tokens(tmp_path):
    model, settings = network(PE), dict(embed_dim=384, num_heads=6)
    weights = vit(depth=12, **settings)
    load("--dino-load", weights, model, tmp_path)
    assert torch.equal(model.pos_embed.data, weights["pos_embed"][:, 1:])
    weights = vit(depth=12, img_size=112, **settings)
    load("--dino-load", weights, model, tmp_path)
    grid = weights["pos_embed"][:, 1:].reshape(1, 7, 7, 384).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(14, 14), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.pos_embed.data, grid.permute(0, 2, 3, 1).reshape(1, 196, 384))
    refused("--dino-load", without(weights, "pos_embed"), model, tmp_path, ["['pos_embed']"])


def test_dino_fills_the_eleven_blocks_of_the_convmixer(tmp_path):
    model = network("Semiformer_convmixer_12depth")
    changed = load("--dino-load", vit(depth=12, embed_dim=384, num_heads=6), model, tmp_path)
    assert {key for key in changed if changed[key]} == {key for key in changed if stream(key)}
    assert sum(changed.values()) == 3 + 11 * 12


def test_dino_refuses_what_does_not_fit(tmp_path):
    model, weights = network(), vit()
    for content, words in (
        (without(weights, "cls_token"), ["lacks 1 tensors", "cls_token"]),
        (without(weights, "norm.bias"), ["trans_norm.bias"]),
        (without(weights, "blocks.2.mlp.fc1.bias"), ["conv_trans_3.trans_block.mlp.fc1.bias"]),
        (vit(depth=11), ["lacks 12 tensors", "conv_trans_12.trans_block.norm1.weight"]),
        (weights | {"blocks.0.norm1.bias": torch.zeros(7, 1)}, ["trans_1.norm1.bias is (7, 1) there"]),
        (vit(embed_dim=384, num_heads=6), ["is of another network", "(1, 1, 384) there, (1, 1, 192) here"]),
        (weights | {"blocks.3.ls1.gamma": torch.zeros(192)}, ["1 others", "conv_trans_4.trans_block.ls1.gamma"]),
        (weights | {"norm_pre.bias": torch.zeros(192)}, ["is no plain ViT", "norm_pre.bias"]),
        (noisy(model), ["is no plain ViT", "trans_norm.weight"]),
    ):
        refused("--dino-load", content, model, tmp_path, words)
    refused("--dino-load", weights, network("resnet18"), tmp_path, ["this --model has one stream"])


# -------------------------------------------------------------------------------- semiformer, resnet, warmup-model


def test_semiformer_gives_everything_but_the_heads(tmp_path, capsys):
    for classes in (3, 5):
        model, weights = network(), noisy(network(classes=classes))
        changed = load("--semiformer-load", {"model": weights}, model, tmp_path)
        assert {key for key in changed if not changed[key]} == {key for key in changed if "cls_head" in key}
        assert all(torch.equal(model.state_dict()[key], weights[key]) for key in weights if changed[key])
        assert capsys.readouterr().out.count("trans_cls_head.weight") == 2
    headless = {key: value for key, value in weights.items() if "cls_head" not in key}
    assert load("--semiformer-load", {"model": headless}, network(), tmp_path) == changed
    for content, words in (
        (without(weights, "bn1.running_var"), ["lacks 1 tensors", "bn1.running_var"]),  # a buffer
        (without(weights, "cls_token"), ["lacks 1 tensors", "cls_token"]),
        (weights | {"pos_embed": torch.zeros(1, 196, 192)}, ["1 others", "pos_embed"]),
        (weights | {"conv1.weight": torch.zeros(64, 3, 3, 3)}, ["conv1.weight is (64, 3, 3, 3) there"]),
        (noisy(network("Semiformer_micro_patch16")), ["is of another network"]),
    ):
        refused("--semiformer-load", {"model": content}, model, tmp_path, words)


@pytest.mark.parametrize("target", ["resnet50", "myresnet50"])
@pytest.mark.parametrize("source", ["resnet50", "myresnet50"])
def test_resnet_gives_everything_but_fc_with_and_without_prefix(tmp_path, source, target):
    model, weights = network(target), noisy(network(source, 5))
    changed = load("--resnet-load", {"model": weights} if source == "myresnet50" else weights, model, tmp_path)
    assert {key.removeprefix("model.") for key in changed if not changed[key]} == {"fc.weight", "fc.bias"}
    bare = {key.removeprefix("model."): value for key, value in weights.items()}
    assert all(
        torch.equal(model.state_dict()[key], bare[key.removeprefix("model.")]) for key in changed if changed[key]
    )


def test_resnet_of_an_old_pytorch_counts_no_batches(tmp_path, capsys):
    model = network("resnet18")
    weights = {key: value for key, value in noisy(model).items() if not key.endswith("num_batches_tracked")}
    changed = load("--resnet-load", weights, model, tmp_path)
    assert {key for key in changed if not changed[key]} == {"fc.weight", "fc.bias"} | set(changed) - set(weights)
    assert "bn1.num_batches_tracked" in capsys.readouterr().out


def test_resnet_refuses_what_does_not_fit(tmp_path):
    model = network("resnet18")
    weights = noisy(model)
    for content, words in (
        (without(weights, "bn1.running_mean"), ["lacks 1 tensors", "bn1.running_mean"]),
        (without(weights, "layer4.1.conv2.weight"), ["layer4.1.conv2.weight"]),
        (weights | {"layer1.0.conv1.weight": torch.zeros(1)}, ["layer1.0.conv1.weight is (1,) there"]),
        (noisy(network("resnet34")), ["others", "layer1.2.conv1.weight"]),
    ):
        refused("--resnet-load", content, model, tmp_path, words)
    refused("--resnet-load", weights, network(), tmp_path, ["is of another network"])


def test_warmup_model_gives_all_weights_strictly(tmp_path):
    model, weights = network(), noisy(network())
    assert all(load("--warmup-model-load", {"model": weights, "epoch": 29}, model, tmp_path).values())
    assert all(torch.equal(model.state_dict()[key], weights[key]) for key in weights)
    for content, words in (
        (without(weights, "trans_cls_head.bias"), ["trans_cls_head.bias"]),
        (weights | {"x": torch.zeros(1)}, ["1 others", "['x']"]),
        (noisy(network(classes=5)), ["has 5 classes, but the data has 3 class folders"]),
    ):
        refused("--warmup-model-load", {"model": content}, model, tmp_path, words)


# -------------------------------------------------------------------------------- flags, files, order


@pytest.mark.parametrize("flag", FILES)
def test_a_file_that_is_not_there_or_no_checkpoint_is_named_with_its_flag(tmp_path, flag):
    path, model = tmp_path / "start.pth", network("resnet18")
    args = parse(FILES[flag].replace("FILE", str(path)))
    with pytest.raises(FileNotFoundError, match=rf"^{flag}: There is no checkpoint {path}"):
        load_initial_weights(args, model)
    path.write_text("not a checkpoint")
    with pytest.raises(ValueError, match=rf"^{flag}: .*{path}"):
        load_initial_weights(args, model)


@pytest.mark.parametrize("flag", list(FILES)[1:])
def test_a_flag_without_its_file_and_a_file_without_its_flag_name_both(flag):
    tiny = "--data-set IMNET --data-path nowhere --device cpu "
    for line, message in (
        (flag, f"{flag} needs a file: add {flag}-file FILE."),
        (f"{flag}-file a.pth", f"{flag}-file a.pth is read with {flag} only: add {flag}, or leave the file out."),
    ):
        for refuse in (
            initial_weight_files,
            lambda args: load_initial_weights(args, None),
            semi_main.main,
        ):  # before any data is read
            with pytest.raises(ValueError) as error:
                refuse(parse(tiny + line))
            assert str(error.value) == message


def test_files_load_in_the_published_order(tmp_path, monkeypatch):
    line = " ".join(FILES[flag].replace("FILE", flag.strip("-")) for flag in reversed(FILES))
    assert initial_weight_files(parse(line)) == [(flag, flag.strip("-")) for flag in FILES]
    assert initial_weight_files(parse("")) == []
    model = network()
    tuned, dino, semiformer, warm = noisy(model, 1), vit(), noisy(model, 3), noisy(model, 4)
    for name, content in (("finetune", tuned), ("dino", dino), ("semiformer", semiformer), ("warm", warm)):
        torch.save(content, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    line = "--dino-load --dino-load-file dino --finetune finetune"
    load_initial_weights(parse(line), model)
    own = model.state_dict()
    assert torch.equal(own["conv1.weight"], tuned["conv1.weight"]) and torch.equal(own["cls_token"], dino["cls_token"])
    line += " --semiformer-load --semiformer-load-file semiformer"
    load_initial_weights(parse(line), model)
    assert all(torch.equal(own[key], (tuned if "cls_head" in key else semiformer)[key]) for key in own)
    load_initial_weights(parse(line + " --warmup-model-load --warmup-model-load-file warm"), model)
    assert all(torch.equal(own[key], warm[key]) for key in own)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    root = make_tree(tmp_path_factory.mktemp("tree"), classes=2)
    return (
        f"--data-set SEMI-IMNET --data-path {root} --data-split-file {root / 'labelled.txt'} "
        "--model resnet10t --input-size 48 --drop-path 0 --batch-size 4 --mu 0.5 --epochs 1 --steps-per-epoch 1 "
        "--num_workers 0 --mixup 0 --cutmix 0 --device cpu --model-ema-decay 0.5"
    )


def test_the_average_starts_from_the_loaded_weights_and_resume_comes_last(tmp_path, tiny):
    weights = noisy(network("resnet10t", 2))
    torch.save({"model": weights}, tmp_path / "start.pth")
    for flag in ("--finetune", "--warmup-model-load"):
        line = f"{tiny} {FILES[flag]}".replace("FILE", str(tmp_path / "start.pth"))
        state = semi_main.Run(parse(line), torch.device("cpu")).state
        assert all(torch.equal(state.model.state_dict()[key], weights[key]) for key in weights)
        assert all(torch.equal(state.ema.module.state_dict()[key], weights[key]) for key in weights)
        assert state.epoch == -1
    resumed = noisy(network("resnet10t", 2), seed=5)
    torch.save(resumed, tmp_path / "resumed.pth")
    state = semi_main.Run(parse(f"{line} --resume {tmp_path / 'resumed.pth'}"), torch.device("cpu")).state
    assert all(torch.equal(state.model.state_dict()[key], resumed[key]) for key in resumed)


# -------------------------------------------------------------------------------- URLs


def saved(weights, folder):
    torch.save(weights, folder / "served.pth")
    return (folder / "served.pth").read_bytes()


def test_finetune_and_resume_take_a_url(tmp_path, server, tiny):
    address, content, _ = server
    weights = noisy(network("resnet10t", 2))
    content["/start.pth"] = saved({"model": weights}, tmp_path)
    for flag in ("--finetune", "--resume"):
        state = semi_main.Run(parse(f"{tiny} {flag} {address}/start.pth"), torch.device("cpu")).state
        assert all(torch.equal(state.model.state_dict()[key], weights[key]) for key in weights)
    with pytest.raises(OSError, match=f"^--finetune: Cannot download {address}/none.pth"):
        semi_main.Run(parse(f"{tiny} --finetune {address}/none.pth"), torch.device("cpu"))


def test_eval_takes_a_url(tmp_path, server, tiny):
    address, content, _ = server
    weights = network("resnet10t", 2).state_dict()
    content["/start.pth"] = saved(weights, tmp_path)
    meters = semi_main.evaluate_checkpoint(parse(f"{tiny} --eval --resume {address}/start.pth"), torch.device("cpu"))
    assert meters["checkpoint"] == f"{address}/start.pth" and math.isfinite(meters["loss"])


# -------------------------------------------------------------------------------- forking an ablation


def test_fork_ablation_resumes_the_fork_and_later_its_own_checkpoint(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    script = Path(__file__).parents[1] / "script" / "fork_ablation.sh"
    settings = {"FORK": "base/epoch_29_checkpoint.pth", "OUTPUT": str(tmp_path), "DATA_ROOT": "d", "SPLIT": "s"}
    env = {"PATH": os.environ["PATH"], "PYTHON": str(python), **settings}

    def last(flag):
        done = subprocess.run(
            ["bash", script, "--threshold", "0.8"], env=env, capture_output=True, text=True, check=True
        )
        words = done.stdout.split()
        return [words[i + 1] for i, word in enumerate(words) if word == flag][-1]

    assert (last("--threshold"), last("--output_dir"), last("--epochs")) == ("0.8", str(tmp_path), "600")
    assert last("--resume") == settings["FORK"]
    (tmp_path / "checkpoint.pth").touch()
    assert last("--resume") == "auto"
    for name in ("FORK", "OUTPUT"):
        done = subprocess.run(["bash", script], env=without(env, name), capture_output=True, text=True)
        assert done.returncode and f"set {name} to" in done.stderr
