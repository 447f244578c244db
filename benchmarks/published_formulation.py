"""The published formulation, built from this project's parts, which benchmarks/benchmark.py compares with ours.

Parameters, state dict, losses and the order of a step are ours; only the optimizations are missing. Squeeze and expand
convolve the feature map (squeeze does so before it pools), the expanded map is enlarged and added before it is
convolved, attention is an explicit softmax, feature maps are NCHW, AdamW and the moving average process one tensor at
a time, the Vote and weight policies one image at a time, and workers convert Pillow images to float.
Written from the project's specification and documentation, not from the released code.
"""

import math
from copy import deepcopy

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.models.vision_transformer import Attention
from torch.nn import functional as F
from torchvision import transforms as tv

from images.transforms import repair_posterize
from losses import objective
from models.blocks import ConvBlock, FCUDown, FCUUp, enlarged
from training.optimization import build_optimizer


class ConvThenPool(FCUDown):
    """Squeeze in the published order: 1x1 convolution of the full map, then average pooling."""

    def forward(self, x, class_token):
        """(N, C, H, W), (N, 1, E) -> (N, 1 + HW/s^2, E)."""
        x = self.conv_project(x)
        x = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        x = x.flatten(2).transpose(1, 2)  # (N, E, H/s, W/s) -> (N, L, E)
        return torch.cat([class_token, F.gelu(self.ln(x))], dim=1)


class ConvOnMap(FCUUp):
    """Expand with a 1x1 convolution of the map."""

    def forward(self, tokens, grid):
        """(N, 1 + L, E), grid (h, w) with hw = L -> (N, C, h, w)."""
        x = tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, *grid)  # (N, L, E) -> (N, E, h, w)
        return F.relu(self.bn(self.conv_project(x)))


class AddThenConv(ConvBlock):
    """Bottleneck block that enlarges the expanded map at full width and adds it before the first convolution."""

    def forward(self, x, expanded=None):
        """(N, in, H, W), expanded map or None -> (N, out, H/stride, W/stride), and the activation for squeeze."""
        if expanded is None or self.narrow:
            return super().forward(x, expanded)
        shortcut = self.residual_bn(self.residual_conv(x)) if self.project else x
        x = F.relu(self.bn1(self.conv1(x + enlarged(expanded, x))))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)) + shortcut)
        return x, x


class ExplicitAttention(Attention):
    """Attention as four operations: product with the keys, scaling, softmax, product with the values."""

    def forward(self, x, **_):
        """(N, L, E) -> (N, L, E)."""
        n, length, _ = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # each (N, heads, L, E / heads)
        attention = self.attn_drop((q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1))
        return self.proj_drop(self.proj((attention @ v).transpose(1, 2).reshape(n, length, -1)))


PARTS = {  # optimization: {our module: the published one that it replaces}
    "pool first": {FCUDown: ConvThenPool, FCUUp: ConvOnMap},
    "enlarge last": {ConvBlock: AddThenConv},
    "SDPA": {Attention: ExplicitAttention},
}


def as_published(model, optimizations=()):
    """Copy a network of ours into the published formulation. The copy has the same state dict.

    Args:
        optimizations: those that the copy keeps, keys of `PARTS` or "channels_last".
    """
    layout = torch.channels_last if "channels_last" in optimizations else torch.contiguous_format
    model = deepcopy(model).to(memory_format=layout)
    replaced = {ours: theirs for name in PARTS if name not in optimizations for ours, theirs in PARTS[name].items()}
    for module in model.modules():
        module.__class__ = replaced.get(type(module), type(module))
    return model


class PerTensorEma:
    """The exponential moving average of a state dict, one tensor after the other."""

    def __init__(self, model, decay):
        self.module, self.decay = deepcopy(model).eval(), decay

    @torch.no_grad()
    def update(self, model):
        """average <- decay * average + (1 - decay) * model."""
        average = self.module.state_dict()
        for name, value in model.state_dict().items():
            average[name].copy_(self.decay * average[name] + (1 - self.decay) * value)


def adamw(args, model):
    """AdamW with the parameter groups of our flags, one tensor after the other."""
    ours = build_optimizer(args, model)
    settings = {key: ours.defaults[key] for key in ("lr", "betas", "eps")}
    groups = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in ours.param_groups]
    return torch.optim.AdamW(groups, **settings, foreach=False, fused=False)


def arbitrate(policy, conv, trans):
    """(target, weight) of one image under a Vote or weight policy, following the published table row by row.

    Args:
        conv, trans: (class, its probability, whether that reaches the threshold), of the CNN and the transformer.
    """
    (c_class, c_prob, c_confident), (t_class, t_prob, t_confident) = conv, trans
    if not c_confident and (not t_confident or policy in ("Vote_larger2", "Vote_equal2")):
        return 0, 0.0
    both = c_confident and t_confident
    larger = c_class if c_prob > t_prob else t_class
    if policy.startswith("Vote"):
        if not both:
            return (c_class if c_confident else t_class), 1.0
        if policy in ("Vote_equal", "Vote_equal2"):
            return (c_class, 1.0) if c_class == t_class else (0, 0.0)
        return (c_class if policy == "Vote_cnnBias" else larger), 1.0

    version = int(policy[-1])
    if version <= 4:
        if both:
            return (c_class, 1.0) if c_class == t_class else (larger, 0.5)
        if c_confident:
            return c_class, 1.0 if version in (1, 2) else 0.5
        return (t_class, 0.5) if version in (2, 4) else (0, 0.0)
    if both:
        return c_class, 1.0 if c_class == t_class else 0.5
    if c_confident:
        return c_class, 0.5 if version == 5 else 1.0
    return 0, 0.0


MERGES = {  # the policies with a single distribution, which have no loop in the released code either
    "cnn": lambda conv, trans: conv.softmax(-1),
    "transformer": lambda conv, trans: trans.softmax(-1),
    "fuse": lambda conv, trans: ((conv + trans) / 2).softmax(-1),
    "softmax_fuse": lambda conv, trans: (conv.softmax(-1) + trans.softmax(-1)) / 2,
}


def select_targets(conv_logits, trans_logits, policy, threshold, temperature=1.0):
    """`pseudo_labels.select_targets` with a loop over images: logits (U, C) twice -> targets and weights (U,)."""
    dtype = torch.promote_types(conv_logits.dtype, torch.float32)
    conv, trans = (logits.to(dtype) / temperature for logits in (conv_logits, trans_logits))
    if policy in MERGES:
        probability, target = MERGES[policy](conv, trans).max(-1)
        return target, (probability >= threshold).to(dtype)
    streams = [logits.softmax(-1).max(-1) for logits in (conv, trans)]
    targets, weights = torch.zeros_like(streams[0].indices), torch.zeros_like(streams[0].values)
    for i in range(len(conv)):
        predictions = [(cls[i].item(), prob[i].item(), (prob[i] >= threshold).item()) for prob, cls in streams]
        targets[i], weights[i] = arbitrate(policy, *predictions)
    return targets, weights


def train_step(model, optimizer, ema, labelled, unlabelled, recipe, autocast):
    """Train one step of the published formulation; the arguments are those of `engine.train_step`.

    Returns the loss parts. Raises FloatingPointError if the loss is not finite, which synchronises with the device.
    """
    (images, labels), (strong, weak) = labelled[:2], unlabelled[:2]
    with autocast():
        logits = model(torch.cat([images, strong]))
        model.eval()
        with torch.no_grad():
            weak_logits = model(weak)
        model.train()
        targets, weights = select_targets(*weak_logits, recipe.policy, recipe.threshold, recipe.temperature)
        first, rest = [x[: len(images)] for x in logits], [x[len(images) :] for x in logits]
        loss, parts = objective(first, labels, rest, targets, weights, recipe)
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"The published step's loss is {loss.item()}.")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    ema.update(model)
    return parts


class PillowToFloat:
    """Image file -> (strong, weak) views, float (3, size, size). Only the decoding is shared by the two views."""

    def __init__(self, size):
        self.strong = repair_posterize(
            create_transform(
                size,
                is_training=True,
                color_jitter=0.4,
                auto_augment="rand-m9-mstd0.5-inc1",
                interpolation="bicubic",
                re_prob=0.25,
                re_mode="pixel",
                re_count=1,
            )
        )
        self.weak = tv.Compose(
            [
                tv.RandomHorizontalFlip(),
                tv.Resize(int(256 / 224 * size), interpolation=tv.InterpolationMode.BICUBIC),
                tv.RandomCrop(size, padding=4, padding_mode="reflect"),
                tv.ToTensor(),
                tv.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
            ]
        )

    def __call__(self, path):
        with open(path, "rb") as file, Image.open(file) as image:
            image = image.convert("RGB")
        return self.strong(image), self.weak(image)
