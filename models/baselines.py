"""Any timm classifier behind the two-stream contract: a list of logits, here of one tensor."""

import timm
from timm.models import generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.blocks import ConvBlock, recomputed
from models.semiformer import describe_networks, head, init_weights, registered


class SingleStream:
    """Mix-in that gives a timm classifier the contract of a two-stream network, and leaves its keys as they are."""

    def forward(self, images, ret_feat=False):
        """(N, 3, H, W) -> [logits (N, classes)]; with `ret_feat` {"output": that, "feat": [(N, features)]}."""
        features = self.forward_features(images)
        logits = [self.forward_head(features)]
        if not ret_feat:
            return logits
        return {"output": logits, "feat": [self.forward_head(features, pre_logits=True)]}


def single_stream(model):
    """Turn a timm classifier into a SingleStream, in place; its class becomes a subclass of what it was."""
    model.__class__ = type(type(model).__name__, (SingleStream, type(model)), {})
    return model


class ConvStream(nn.Module):
    """The CNN stream of a two-stream network alone, one stage for each of its three widths, two blocks a stage.

    Args:
        width: channels of the first stage, which is one block; the second has twice, the third four times as many.
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
        """The head, as of every network of timm."""
        return self.head

    def reset_classifier(self, num_classes):
        """A new head of another number of classes; 0: none, the logits are the features."""
        self.num_classes = num_classes
        self.head = head(self.num_features, num_classes, like=next(self.parameters()))

    def no_weight_decay(self):
        """Parameters AdamW must not decay beside biases and 1-d ones: none."""
        return set()

    def set_grad_checkpointing(self, enable=True):
        """Keep only what passes between blocks, and compute a block again in backward."""
        self.grad_checkpointing = enable

    def forward(self, images):
        """(N, 3, H, W) -> logits (N, num_classes); as of every network of timm, before `single_stream`."""
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images):
        """(N, 3, H, W) -> (N, num_features, H/32, W/32)."""
        x = self.stem(images)
        for block in self.blocks:
            x, _ = recomputed(block, x) if self.grad_checkpointing and self.training else block(x)
        return x

    def forward_head(self, x, pre_logits=False):
        """The map -> logits (N, num_classes), or with `pre_logits` the pooled map."""
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)


class MyResNet(nn.Module):
    """timm's ResNet with every key under `model.`, as the released code saves it."""

    def __init__(self, layout, **kwargs):
        super().__init__()
        self.model = single_stream(timm.create_model(layout, **kwargs))
        self.num_classes, self.num_features = self.model.num_classes, self.model.num_features

    def set_grad_checkpointing(self, enable=True):
        """timm's: compute layers again in backward."""
        self.model.set_grad_checkpointing(enable)

    def get_classifier(self):
        """timm's: the head."""
        return self.model.get_classifier()

    def reset_classifier(self, num_classes):
        """timm's: a new head of another number of classes."""
        self.num_classes = num_classes
        self.model.reset_classifier(num_classes)

    def no_weight_decay(self):
        """Parameters AdamW must not decay beside biases and 1-d ones: none."""
        return set()

    def forward_features(self, images):
        """timm's: (N, 3, H, W) -> (N, num_features, H/32, W/32)."""
        return self.model.forward_features(images)

    def forward_head(self, x, pre_logits=False):
        """timm's: the map -> logits (N, num_classes), or with `pre_logits` the pooled map."""
        return self.model.forward_head(x, pre_logits)

    def forward(self, images, ret_feat=False):
        """(N, 3, H, W) -> [logits (N, classes)]; with `ret_feat` the pooled features too."""
        return self.model(images, ret_feat)


default_cfgs = generate_default_cfgs(
    describe_networks("myresnet50", "myresnet101", "myresnet152", first_conv="model.conv1", classifier="model.fc")
    | describe_networks("conv_micro", first_conv="stem.0", classifier="head")
    | describe_networks(
        *("deit_med_patch16_224", "deit_micro_patch16_224"),
        first_conv="patch_embed.proj",
        classifier="head",
        fixed_input_size=True,
    )
)


@registered(MyResNet, layout="resnet50")
def myresnet50():
    """timm's resnet50 under the prefix `model.`."""


@registered(MyResNet, layout="resnet101")
def myresnet101():
    """timm's resnet101 under the prefix `model.`."""


@registered(MyResNet, layout="resnet152")
def myresnet152():
    """timm's resnet152 under the prefix `model.`."""


@registered(VisionTransformer, patch_size=16, embed_dim=576, depth=12, num_heads=9)
def deit_med_patch16_224():
    """DeiT between small and base: embedding 576, 9 heads; timm has the other three sizes."""


@registered(VisionTransformer, patch_size=16, embed_dim=192, depth=4, num_heads=3)
def deit_micro_patch16_224():
    """Ours, for the study on two CPU cores: DeiT-tiny's width, four blocks."""


@registered(ConvStream, width=172)
def conv_micro():
    """Ours, for the study: the CNN stream of Semiformer_micro alone, wider, so that the size is the same."""
