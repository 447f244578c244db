"""Any timm classifier behind the two-stream contract: a list of logits, here of one tensor."""

import timm
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from models.semiformer import build


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


class MyResNet(nn.Module):
    """timm's ResNet with every key under `model.`, as the released code saves it."""

    def __init__(self, layout, **kwargs):
        super().__init__()
        self.model = single_stream(timm.create_model(layout, **kwargs))
        self.num_classes = self.model.num_classes

    def forward(self, images, ret_feat=False):
        """(N, 3, H, W) -> [logits (N, classes)]; with `ret_feat` the pooled features too."""
        return self.model(images, ret_feat)


def _resnet(layout, kwargs):
    return build(lambda **settings: MyResNet(layout, **settings), {}, kwargs)


@register_model
def myresnet50(**kwargs):
    """timm's resnet50 under the prefix `model.`."""
    return _resnet("resnet50", kwargs)


@register_model
def myresnet101(**kwargs):
    """timm's resnet101 under the prefix `model.`."""
    return _resnet("resnet101", kwargs)


@register_model
def myresnet152(**kwargs):
    """timm's resnet152 under the prefix `model.`."""
    return _resnet("resnet152", kwargs)


@register_model
def deit_med_patch16_224(**kwargs):
    """DeiT between small and base: embedding 576, 9 heads; timm has the other three sizes."""
    return build(VisionTransformer, dict(patch_size=16, embed_dim=576, depth=12, num_heads=9), kwargs)


@register_model
def deit_micro_patch16_224(**kwargs):
    """Ours, for the study on two CPU cores: DeiT-tiny's width, four blocks."""
    return build(VisionTransformer, dict(patch_size=16, embed_dim=192, depth=4, num_heads=3), kwargs)
