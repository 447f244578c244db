"""Single-stream networks with the interface of the two-stream ones: a list of logits, here of one tensor."""

import math

import timm
from timm.models import generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.blocks import ConvBlock, recomputed
from models.semiformer import head, init_weights, registered


class SingleStream:
    """Mix-in that gives a timm classifier the interface of a two-stream network without changing its state dict."""

    def forward(self, images, ret_feat=False):
        """Map images (N, in_chans, H, W) to [logits (N, num_classes)].

        With `ret_feat`, returns {"output": [logits], "feat": [the head's input (N, num_features)]}.
        """
        features = self.forward_features(images)
        logits = [self.forward_head(features)]
        if not ret_feat:
            return logits
        return {"output": logits, "feat": [self.forward_head(features, pre_logits=True)]}


class FinalNormApart:
    """Mix-in for timm networks that group their parameters into layers: the final norm follows the last block."""

    def group_matcher(self, coarse=False):
        """timm's layers, as patterns or a function. ours: the final norm belongs to the head's, not to a block's."""
        groups = super().group_matcher(coarse)
        if callable(groups):
            return lambda name: math.inf if name.startswith("norm.") else groups(name)
        listed = {name: patterns for name, patterns in groups.items() if isinstance(patterns, list | tuple)}
        # What no pattern matches is in the last layer.
        return groups | {name: [each for each in listed[name] if each[0].lstrip("^") != "norm"] for name in listed}


def single_stream(model):
    """Give a timm classifier the interface of `SingleStream` in place, by replacing its class with a subclass of it."""
    mixins = (SingleStream, FinalNormApart) if hasattr(model, "group_matcher") else (SingleStream,)
    model.__class__ = type(type(model).__name__, (*mixins, type(model)), {})
    return model


class ConvStream(nn.Module):
    """The CNN stream of Semiformer_micro on its own: one block in the first stage, two in the second and third.

    Args:
        width: channels of the first stage; the second has 2 * width, the third 4 * width.
    """

    def __init__(self, num_classes=1000, width=256, in_chans=3):
        super().__init__()
        self.num_classes, self.num_features, self.grad_checkpointing = num_classes, 4 * width, False
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        shapes = [
            (64, width, 1),
            (width, 2 * width, 2),
            (2 * width, 2 * width, 1),
            (2 * width, 4 * width, 2),
            (4 * width, 4 * width, 2),
        ]
        self.blocks = nn.ModuleList(ConvBlock(a, b, stride, project=a != b or stride > 1) for a, b, stride in shapes)
        self.head = head(4 * width, num_classes)
        init_weights(self)

    def get_classifier(self):
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes):
        """Replace the head; with 0 classes the logits are the features."""
        self.num_classes = num_classes
        self.head = head(self.num_features, num_classes, like=next(self.parameters()))

    def no_weight_decay(self):
        """Names of parameters that AdamW must not decay, in addition to biases and 1-d parameters: none."""
        return set()

    def group_matcher(self, coarse=False):
        """Patterns of the layers, for timm's layer decay: the stem, each block, the head."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    def set_grad_checkpointing(self, enable=True):
        """Enable or disable gradient checkpointing: backward recomputes each block from its input."""
        self.grad_checkpointing = enable

    def forward(self, images):
        """Map images (N, in_chans, H, W) to logits (N, num_classes), as timm's networks do."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images):
        """Map images (N, in_chans, H, W) to a feature map (N, num_features, H/32, W/32)."""
        x = self.stem(images)
        for block in self.blocks:
            x, _ = recomputed(block, x) if self.grad_checkpointing and self.training else block(x)
        return x

    def forward_head(self, x, pre_logits=False):
        """Map the feature map to logits (N, num_classes), or with `pre_logits` to its spatial mean."""
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)


class MyResNet(nn.Module):
    """timm's ResNet with `model.` in front of every key of its state dict, as the released code saves it."""

    def __init__(self, layout, **kwargs):
        super().__init__()
        self.model = single_stream(timm.create_model(layout, **kwargs))
        self.num_classes, self.num_features = self.model.num_classes, self.model.num_features

    def group_matcher(self, coarse=False):
        """Patterns of the layers, for timm's layer decay, as timm's ResNet has them."""
        return {"stem": r"^model\.(?:conv1|bn1)", "blocks": r"^model\.layer(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable=True):
        """Enable or disable gradient checkpointing, as timm's ResNet does it."""
        self.model.set_grad_checkpointing(enable)

    def get_classifier(self):
        """Return the head."""
        return self.model.get_classifier()

    def reset_classifier(self, num_classes):
        """Replace the head."""
        self.num_classes = num_classes
        self.model.reset_classifier(num_classes)

    def no_weight_decay(self):
        """Names of parameters that AdamW must not decay, in addition to biases and 1-d parameters: none."""
        return set()

    def forward_features(self, images):
        """Map images (N, in_chans, H, W) to a feature map (N, num_features, H/32, W/32)."""
        return self.model.forward_features(images)

    def forward_head(self, x, pre_logits=False):
        """Map the feature map to logits (N, num_classes), or with `pre_logits` to the pooled features."""
        return self.model.forward_head(x, pre_logits)

    def forward(self, images, ret_feat=False):
        """See `SingleStream.forward`."""
        return self.model(images, ret_feat)


RESNET_CFG = {"first_conv": "model.conv1", "classifier": "model.fc"}
DEIT_CFG = {"first_conv": "patch_embed.proj", "classifier": "head", "fixed_input_size": True}
default_cfgs = generate_default_cfgs(
    {
        **dict.fromkeys(("myresnet50", "myresnet101", "myresnet152"), RESNET_CFG),
        "conv_micro": {"first_conv": "stem.0", "classifier": "head"},
        **dict.fromkeys(("deit_med_patch16_224", "deit_micro_patch16_224"), DEIT_CFG),
        **dict.fromkeys(("vit_base_patch16_clsgap_224", "vit_large_patch16_clsgap_224"), DEIT_CFG),
    }
)


@registered(MyResNet, layout="resnet50")
def myresnet50():
    """timm's resnet50 with the key prefix `model.`."""


@registered(MyResNet, layout="resnet101")
def myresnet101():
    """timm's resnet101 with the key prefix `model.`."""


@registered(MyResNet, layout="resnet152")
def myresnet152():
    """timm's resnet152 with the key prefix `model.`."""


@registered(VisionTransformer, patch_size=16, embed_dim=576, depth=12, num_heads=9)
def deit_med_patch16_224():
    """A DeiT between small and base, with embedding dimension 576 and 9 heads; timm has tiny, small and base."""


@registered(VisionTransformer, patch_size=16, embed_dim=192, depth=4, num_heads=3)
def deit_micro_patch16_224():
    """Ours, for the study on two CPU cores: DeiT-tiny with four blocks."""


@registered(VisionTransformer, patch_size=16, embed_dim=768, depth=12, num_heads=12, global_pool="avg")
def vit_base_patch16_clsgap_224():
    """timm's vit_base_patch16_224 with the mean of the patch tokens for the head, as MAE and Semi-ViT train it."""


@registered(VisionTransformer, patch_size=16, embed_dim=1024, depth=24, num_heads=16, global_pool="avg")
def vit_large_patch16_clsgap_224():
    """timm's vit_large_patch16_224 with the mean of the patch tokens for the head."""


@registered(ConvStream, width=172)
def conv_micro():
    """Ours, for the study: the CNN stream of Semiformer_micro on its own, wider to have about as many parameters."""
