"""The networks: published keys, published numbers, gradients everywhere."""

from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

import models
from images.transforms import eval_view
from models import build_model, enable_grad_checkpointing, fold_batchnorm
from models.blocks import ConvBlock, FCUDown
from tests.forms import FORMS
from tests.reference import fill, images, load
from training import checkpoint

STATE_DICTS = load("state_dict.json")
FORWARD = load("forward.npz")
CASES = sorted({tuple(key.split("|")[:3]) for key in FORWARD.files})
TWO_STREAM = [
    "Semiformer_tiny_patch16",
    "Semiformer_PE_small_patch16",
    "Semiformer_convmixer_12depth",
    "Conformer_tiny_patch16",
]


def close(ours, reference):
    return np.abs(np.asarray(ours) - reference).max() <= 1e-8 * np.abs(reference).max()


@pytest.mark.parametrize("name", STATE_DICTS)
def test_keys_order_shapes_and_count_are_the_published_ones(name):
    model = build_model(name, 1000)
    ours = [(key, "x".join(map(str, value.shape))) for key, value in model.state_dict().items()]
    assert ours == list(STATE_DICTS[name]["state_dict"].items())
    assert sum(p.numel() for p in model.parameters()) == STATE_DICTS[name]["n_parameters"]


@pytest.mark.parametrize("name,seed,fcu", CASES)
def test_forward_and_gradients_equal_the_published_ones(name, seed, fcu):
    assert_published(name, seed, fcu)


@pytest.mark.proof
@pytest.mark.parametrize("form", ["published", "checkpointed", "compiled"])
def test_every_form_of_the_whole_network_gives_the_published_numbers(form):
    """The short form: in test_engine, six training steps of a narrow network in these and all other forms."""
    assert_published("Semiformer_small_patch16", "seed1", "remove_fcu=False", FORMS[form])


def assert_published(name, seed, fcu, form=FORMS["ours"]):
    """Logits, features, loss and gradient norms of a network in some form are the reference's."""

    def ref(what):
        return FORWARD[f"{name}|{seed}|{fcu}|{what}"]

    number = int(seed[4:])
    model = form(fill(build_model(name, 1000, remove_fcu=fcu.endswith("True")), number)).eval()
    batch = images(number + 100)
    small = batch if name.startswith("deit") else images(number, size=64)
    with torch.no_grad():
        out = model(batch, ret_feat=True)
        assert all(torch.equal(a, b) for a, b in zip(model(small), model(small, ret_feat=True)["output"], strict=True))
    names = ["conv", "trans"] if len(out["output"]) == 2 else [""]
    for stream, logits, feat in zip(names, out["output"], out["feat"]):
        assert close(logits, ref(f"eval_{stream}".rstrip("_")))
        if name.startswith("Semiformer"):
            assert close(feat, ref(f"feat_{stream}"))
    if not name.startswith("Semiformer"):
        return

    model.train()
    loss = sum(F.cross_entropy(logits, torch.tensor([3, 7])) for logits in model(batch))
    loss.backward()
    assert close(loss.item(), ref("train_loss"))
    norms = dict(zip(ref("grad_names").tolist(), ref("grad_norms").tolist()))
    ours = dict(model.named_parameters())
    assert set(norms) == set(ours)
    for key, norm in norms.items():
        grad = ours[key].grad
        if np.isnan(norm):
            assert grad is None or grad.norm() == 0
        else:
            assert abs(grad.norm().item() - norm) <= 1e-8 * max(abs(norm), 1e-3), key


@pytest.mark.parametrize("name", TWO_STREAM)
@pytest.mark.parametrize("remove_fcu", [False, True])
def test_a_gradient_reaches_every_parameter_but_a_removed_fusion(name, remove_fcu):
    torch.manual_seed(0)
    model = build_model(name, 5, remove_fcu=remove_fcu).train()
    sum(F.cross_entropy(logits, torch.tensor([1, 2, 3])) for logits in model(torch.randn(3, 3, 64, 64))).backward()
    unreached = [key for key, p in model.named_parameters() if p.grad is None]
    assert unreached == model.unused_parameters()
    fusion = ("squeeze_block", "expand_block")
    assert unreached == [k for k, _ in model.named_parameters() if remove_fcu and any(f in k for f in fusion)]
    # BatchNorm right after it takes any constant away again, so expand's bias has a true gradient of zero.
    zero = [k for k, p in model.named_parameters() if p.grad is not None and not p.grad.abs().any()]
    assert not [k for k in zero if not k.endswith("expand_block.conv_project.bias")]


def test_without_fusion_the_streams_ignore_each_other():
    model = build_model("Semiformer_tiny_patch16", 5, remove_fcu=True, depth=3).double().eval()
    batch = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    conv, trans = model(batch)
    with torch.no_grad():
        model.trans_1.mlp.fc1.weight.mul_(3)
        assert torch.equal(model(batch)[0], conv) and not torch.equal(model(batch)[1], trans)
        model.conv_trans_2.cnn_block.conv1.weight.mul_(3)
        assert not torch.equal(model(batch)[0], conv)


def test_registered_with_timm_and_overridable():
    model = timm.create_model("Semiformer_small_patch16", num_classes=7, channel_ratio=1, embed_dim=96, num_heads=3,
                              depth=6, drop_path_rate=0.3, remove_fcu=True)  # fmt: skip
    assert [tuple(x.shape) for x in model(torch.zeros(2, 3, 48, 48))] == [(2, 7), (2, 7)]
    assert not hasattr(model, "conv_trans_7") and model.conv_trans_6.fusion_block.conv2.stride == (2, 2)
    rates = [model.trans_1.drop_path1, *(getattr(model, f"conv_trans_{i}").trans_block.drop_path1 for i in range(2, 7))]
    assert [getattr(r, "drop_prob", 0.0) for r in rates] == pytest.approx(np.linspace(0, 0.3, 6).tolist())
    assert {"Semiformer_tiny_patch16", "Conformer_base_patch16"} <= set(timm.list_models("*former_*"))
    assert timm.model_entrypoint("deit_tiny_patch16_224").__module__.startswith("timm")


def test_drop_acts_after_projection_and_both_mlp_layers():
    model = build_model("Semiformer_tiny_patch16", 3, drop=0.25, depth=3)
    active = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.p == 0.25]
    blocks = ["trans_1", "conv_trans_2.trans_block", "conv_trans_3.trans_block"]
    assert active == [f"{b}.{layer}" for b in blocks for layer in ("attn.proj_drop", "mlp.drop1", "mlp.drop2")]


def test_med_blocks_act_after_squeeze_has_read_the_map():
    model = timm.create_model("Semiformer_tiny_patch16", num_classes=3, depth=3, num_med_block=1).double().eval()
    assert "conv_trans_2.med_block.0.conv1.weight" in model.state_dict()
    batch, stage = torch.randn(1, 3, 32, 32, dtype=torch.float64), model.conv_trans_3
    conv, trans = model(batch)
    with torch.no_grad():
        stage.med_block[0].conv3.weight.mul_(2)
    assert torch.equal(model(batch)[1], trans) and not torch.equal(model(batch)[0], conv)


def test_squeeze_equals_convolution_then_pool():
    squeeze = FCUDown(8, 6, 4).double()
    x, cls = torch.randn(2, 8, 12, 12, dtype=torch.float64), torch.randn(2, 1, 6, dtype=torch.float64)
    slow = F.avg_pool2d(squeeze.conv_project(x), 4).flatten(2).transpose(1, 2)
    slow = torch.cat([cls, F.gelu(squeeze.ln(slow))], 1)
    assert torch.allclose(squeeze(x, cls), slow, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("narrow", [False, True])
def test_the_shortcut_never_carries_the_expanded_map(narrow):
    block = ConvBlock(8, 8, narrow=narrow).double().eval()
    with torch.no_grad():
        block.bn3.weight.zero_()
    x = torch.rand(1, 8, 4, 4, dtype=torch.float64)
    expanded = torch.randn(1, block.meeting_channels, 4, 4, dtype=torch.float64)
    assert torch.equal(block(x, expanded)[0], x)


@pytest.mark.parametrize("narrow", [False, True])
def test_a_small_expanded_map_is_one_repeated_before_the_first_convolution(narrow):
    torch.manual_seed(0)
    block = ConvBlock(8, 8, narrow=narrow).double()
    x, small = torch.randn(2, 8, 12, 12).double(), torch.randn(2, block.meeting_channels, 3, 3).double()
    repeated = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    if narrow:
        slow = F.relu(block.bn1(block.conv1(x))) + repeated
    else:
        slow = F.relu(block.bn1(block.conv1(x + repeated)))
    slow = F.relu(block.bn3(block.conv3(F.relu(block.bn2(block.conv2(slow))))) + x)
    assert torch.allclose(block(x, small)[0], slow, rtol=1e-11, atol=1e-11)


def test_position_embedding_is_resized_for_another_input_size():
    model = build_model("Semiformer_PE_small_patch16", 3, depth=3).eval()
    batch = torch.randn(1, 3, 64, 64)
    with_position = model(batch)
    with torch.no_grad():
        model.pos_embed.zero_()
    assert not torch.equal(with_position[1], model(batch)[1])
    assert tuple(model.pos_embed.shape) == (1, 196, 384)
    assert model.no_weight_decay() == {"cls_token"}


@pytest.mark.parametrize(
    "name",
    ["resnet18", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "myresnet50", "mobilenetv3_small_050", "conv_micro"],
)
def test_any_timm_classifier_meets_the_contract(name):
    model = build_model(name, 4, img_size=64, drop_path=0.0).eval()
    batch = torch.randn(2, 3, 64, 64)
    out = model(batch, ret_feat=True)
    assert len(out["output"]) == len(out["feat"]) == 1 and out["output"][0].shape == (2, 4)
    inner = model.model if name.startswith("my") else model
    assert torch.allclose(inner.get_classifier()(out["feat"][0]), out["output"][0])
    if name == "vit_tiny_patch16_224":
        plain = timm.create_model(name, num_classes=4, img_size=64)
        plain.load_state_dict(model.state_dict())
        assert torch.equal(plain.eval()(batch), model(batch)[0])


@pytest.mark.parametrize(
    "kwargs,message",
    [
        (dict(name="Semifomer_small_patch16"), "Unknown --model 'Semifomer_small_patch16': did you mean Semiformer_"),
        (dict(name="resnet18", remove_fcu=True), "--remove-fcu .* resnet18 has none"),
        (dict(name="Semiformer_tiny_patch16", drop_block=0.1), "--drop-block .* leave it out"),
        (dict(name="Semiformer_tiny_patch16", depth=8), "depth must be a multiple of 3, .* not 8"),
        (dict(name="vgg11", drop_path=0.1), "vgg11 lacks a setting"),
    ],
)
def test_wrong_settings_are_one_sentence(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_model(num_classes=3, **kwargs)


def test_a_size_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match="50x50 images do not divide into 16-pixel patches"):
        models.build_model("Semiformer_tiny_patch16", 3, depth=3)(torch.zeros(1, 3, 50, 50))
    with pytest.raises(ValueError, match="No weights are hosted"):
        timm.create_model("Semiformer_tiny_patch16", pretrained=True)


@pytest.mark.parametrize(
    "name,left",
    [("Semiformer_micro_patch16", 0), ("Conformer_tiny_patch16", 0), ("conv_micro", 1), ("deit_tiny_patch16_224", 0)],
)
def test_folded_batchnorms_are_the_same_function_on_a_copy(name, left):
    """conv_micro keeps the BatchNorm of its stem, which cannot be folded."""
    model = fill(build_model(name, 10, 64), 7).train()
    batch = images(107, size=64)
    model(batch)  # running statistics that are not 0 and 1
    copy = fold_batchnorm(model)
    assert model.training and not copy.training
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in copy.modules()) == left
    with torch.no_grad():
        for ours, reference in zip(copy(batch), model.eval()(batch)):
            assert close(ours, reference.numpy())


@pytest.mark.parametrize("name", ["Semiformer_micro_patch16", "conv_micro", "myresnet50", "deit_tiny_patch16_224",
                                  "mobilenetv2_035"])  # fmt: skip
def test_activations_computed_again_leave_gradients_and_statistics_as_they_were(name):
    """mobilenetv2's blocks end with a BatchNorm, inside which a recomputation stops."""
    torch.manual_seed(0)
    plain = build_model(name, 10, 32).double().train()
    saving = deepcopy(plain)
    enable_grad_checkpointing(saving)
    batch, kept = torch.randn(4, 3, 32, 32, dtype=torch.float64), {}
    for model in (plain, saving):
        saved = []

        def pack(tensor, saved=saved):
            saved.append(tensor.nbytes)
            return tensor

        for _ in range(2):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = sum((logits**2).mean() for logits in model(batch))
            loss.backward()
        kept[model] = sum(saved)
    assert kept[saving] < 0.9 * kept[plain]
    for ours, reference in zip(saving.parameters(), plain.parameters()):
        assert torch.equal(ours.grad, reference.grad)
    for ours, reference in zip(saving.buffers(), plain.buffers()):
        assert torch.equal(ours, reference)


def test_compiled_and_computed_again_is_the_same_step():
    torch.manual_seed(0)
    plain = build_model("Semiformer_micro_patch16", 10, 32).double().train()
    both = deepcopy(plain)
    enable_grad_checkpointing(both)
    torch._dynamo.reset()
    both.compile(backend="aot_eager")
    batch = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    for model in (plain, both):
        for _ in range(2):
            sum((logits**2).mean() for logits in model(batch)).backward()
    for ours, reference in zip(both.parameters(), plain.parameters()):
        assert torch.allclose(ours.grad, reference.grad, rtol=1e-9, atol=1e-12)
    for ours, reference in zip(both.buffers(), plain.buffers()):
        assert torch.allclose(ours, reference, rtol=1e-12)


SLIM = dict(depth=3, channel_ratio=1, embed_dim=96, num_heads=3)
TIMMS = {"Semiformer_small_patch16": SLIM, "Semiformer_PE_micro_patch16": {}, "conv_micro": {},
         "Conformer_small_patch32": SLIM, "Semiformer_convmixer_12depth": dict(depth=3, mixer_dim=96, embed_dim=96),
         "deit_micro_patch16_224": dict(img_size=64), "myresnet50": dict(layers=(1, 1, 1, 1))}  # fmt: skip


def test_every_network_of_ours_is_described_as_timm_does():
    assert len(models.NAMES) == 18
    for name in models.NAMES:
        cfg = timm.get_pretrained_cfg(name)
        view = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict()))
        assert repr(view.transforms[:2]) == repr(eval_view(224).transforms[:2])
        assert view.transforms[3].mean.tolist() == pytest.approx(eval_view(224).transforms[3].mean)
        assert (cfg.architecture, cfg.num_classes, cfg.has_weights) == (name, 1000, None)


@pytest.mark.parametrize("name", TIMMS)
def test_timms_conventions_on_every_kind_of_network(name):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=10, in_chans=1, **TIMMS[name]).double().eval()
    batch = torch.randn(2, 1, 64, 64, dtype=torch.float64)

    def as_list(thing):
        return list(thing) if isinstance(thing, list | tuple) else [thing]

    with torch.no_grad():
        maps, logits = model.forward_features(batch), as_list(model(batch))
        assert all(map(torch.equal, as_list(model.forward_head(maps)), logits))
        features, heads = as_list(model.forward_head(maps, pre_logits=True)), as_list(model.get_classifier())
        assert all(torch.equal(head(x), y) for head, x, y in zip(heads, features, logits))
        cfg, modules = model.pretrained_cfg, dict(model.named_modules())
        assert [modules[key] for key in as_list(cfg["classifier"])] == heads and model.default_cfg is cfg
        assert all(modules[key].in_channels == 1 for key in as_list(cfg["first_conv"]))
        tokens = {"S": {"cls_token"}, "C": {"cls_token"}, "d": {"cls_token", "pos_embed"}}.get(name[0], set())
        assert set(model.no_weight_decay()) & set(dict(model.named_parameters())) == tokens
        keys = list(model.state_dict())
        model.reset_classifier(7)
        assert model.num_classes == 7 and list(model.state_dict()) == keys
        assert [tuple(x.shape) for x in as_list(model(batch))] == [(2, 7)] * len(logits)
        model.reset_classifier(0)
        assert all(map(torch.equal, as_list(model(batch)), features))
    plain = timm.create_model(name, num_classes=0, in_chans=1, **TIMMS[name])
    assert not any(key in keys for key in plain.state_dict() if checkpoint.is_head(key))


def test_timms_overlay_reaches_the_description():
    model = timm.create_model("Semiformer_micro_patch16", pretrained_cfg_overlay=dict(input_size=(3, 64, 64)))
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 64, 64)


def test_a_network_without_blocks_cannot_compute_again():
    with pytest.raises(ValueError, match="^--grad-checkpointing: VGG has no blocks to compute again; leave it out."):
        enable_grad_checkpointing(build_model("vgg11", 10, 32))
