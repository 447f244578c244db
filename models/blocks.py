"""The parts a two-stream network is made of: CNN bottleneck, squeeze (CNN -> tokens), expand (tokens -> CNN).

Shapes: N images, C channels, H x W map, L patch tokens, E embedding. The transformer block is timm's: its
parameter names are the published ones.
"""

from copy import deepcopy
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

BatchNorm = partial(nn.BatchNorm2d, eps=1e-6)
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def transformer_block(embed_dim, num_heads, mlp_ratio, qkv_bias, drop, drop_path):
    """timm's pre-norm block; `drop` acts after attention's projection and after both MLP layers, nowhere else."""
    return Block(
        embed_dim, num_heads, mlp_ratio, qkv_bias=qkv_bias, proj_drop=drop, drop_path=drop_path, norm_layer=LayerNorm
    )


def fold_batchnorm(network):
    """A copy for evaluation, its BatchNorms worked into the convolutions before them: the same function, fewer steps.

    Modules name such neighbours in `conv_bn`, pairs of attribute names. BatchNorms elsewhere stay.
    """
    copy = deepcopy(network).eval()
    for module in list(copy.modules()):
        for conv, norm in getattr(module, "conv_bn", ()):
            if hasattr(module, norm):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
    return copy


def _update_once(norm, _inputs):
    # Set every time: a recomputation stops as soon as it has what backward asked for, maybe inside this module. A
    # compiled graph holds one update anyway.
    again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
    norm.momentum = 0.0 if again else norm.usual_momentum
    if again:
        norm.num_batches_tracked -= 1


def update_statistics_once(network):
    """Keep BatchNorm's running statistics from a second update where backward computes activations again."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.usual_momentum = module.momentum
            module.register_forward_pre_hook(_update_once)


def recomputed(function, *inputs):
    """function(*inputs), its activations dropped and computed again in backward."""
    return checkpoint(function, *inputs, use_reentrant=False)


class ConvBlock(nn.Module):
    """Bottleneck: 1x1, 3x3 (strided), 1x1 convolutions of middle width out/4, the last ReLU after the sum.

    `narrow` says where the streams meet (Conformer: at the bottleneck; Semiformer: at full width): it decides
    which activation squeeze reads and which convolution the expanded map joins. The shortcut never carries the
    expanded map. Source: Conformer (Peng et al., ICCV 2021), changed as in Semiformer's released code.

    The published order is to enlarge the expanded map, add it to the input, convolve. The first convolution is 1x1, so
    it may come before: its share is computed on the small map and enlarged at a quarter of the width, and no
    second full-width map is kept for backward.
    """

    conv_bn = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("residual_conv", "residual_bn"))

    def __init__(self, in_channels, out_channels, stride=1, project=False, narrow=False):
        super().__init__()
        middle = out_channels // 4
        self.narrow = narrow
        self.meeting_channels = middle if narrow else out_channels
        self.conv1 = nn.Conv2d(in_channels, middle, 1, bias=False)
        self.bn1 = BatchNorm(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride, padding=1, bias=False)
        self.bn2 = BatchNorm(middle)
        self.conv3 = nn.Conv2d(middle, out_channels, 1, bias=False)
        self.bn3 = BatchNorm(out_channels)
        self.project = project
        if project:
            self.residual_conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.residual_bn = BatchNorm(out_channels)

    def forward(self, x, expanded=None):
        """(N, in, H, W), expanded map or None -> (N, out, H/stride, W/stride), the activation squeeze reads.

        The expanded map is (N, meeting channels, h, w) of any size that divides the map's.
        """
        shortcut = self.residual_bn(self.residual_conv(x)) if self.project else x
        # In place where backward needs no output: large maps are not allocated anew.
        x = self.conv1(x)
        if expanded is not None and not self.narrow:
            x += enlarged(F.conv2d(expanded, self.conv1.weight), x)
        x = F.relu(self.bn1(x), inplace=True)
        if expanded is not None and self.narrow:
            x = x + enlarged(expanded, x)
        bottleneck = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = self.bn3(self.conv3(bottleneck))
        x = F.relu(x.add_(shortcut), inplace=True)
        return x, bottleneck if self.narrow else x


def enlarged(expanded, x):
    """The expanded map (N, C, h, w), each pixel repeated (nearest neighbour) to the height and width of the map x."""
    return F.interpolate(expanded, x.shape[-2:], mode="nearest") if expanded.shape[-2:] != x.shape[-2:] else expanded


def _pointwise(conv, tokens):
    """A 1x1 convolution applied to tokens (N, L, C): the same product, without going through a map's layout."""
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)


class FCUDown(nn.Module):
    """Squeeze: a CNN map becomes an increment to the tokens.

    The published order is 1x1 convolution, then average pool. Both are linear and the pool acts on each channel
    alone, so they commute: pooling first is the same function for 1/s^2 of the convolution's cost.
    """

    def __init__(self, in_channels, embed_dim, stride):
        super().__init__()
        self.stride = stride
        self.conv_project = nn.Conv2d(in_channels, embed_dim, 1)
        self.ln = LayerNorm(embed_dim)

    def forward(self, x, class_token):
        """(N, C, H, W), (N, 1, E) -> (N, 1 + HW/s^2, E), the class token in front as it came."""
        x = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        x = _pointwise(self.conv_project, x.flatten(2).transpose(1, 2))  # (N, C, H/s, W/s) -> (N, L, C) -> (N, L, E)
        return torch.cat([class_token, F.gelu(self.ln(x))], dim=1)


class FCUUp(nn.Module):
    """Expand: patch tokens become a map for the CNN, a pixel a token."""

    conv_bn = (("conv_project", "bn"),)

    def __init__(self, embed_dim, out_channels):
        super().__init__()
        self.conv_project = nn.Conv2d(embed_dim, out_channels, 1)
        self.bn = BatchNorm(out_channels)

    def forward(self, tokens, grid):
        """(N, 1 + L, E), grid (h, w) with hw = L -> (N, C, h, w)."""
        x = _pointwise(self.conv_project, tokens[:, 1:])  # (N, L, E) -> (N, L, C)
        return F.relu(self.bn(x.transpose(1, 2).unflatten(2, grid)), inplace=True)


class ConvTransBlock(nn.Module):
    """One stage of both streams and the exchange between them.

    Args:
        cnn_block, fusion_block: modules `(x, expanded=None) -> (x, activation squeeze reads)`.
        med_blocks: further CNN blocks, applied after squeeze has read the map.
        stride: pixels of the CNN map a token covers along one side.
        remove_fcu: never exchange anything; squeeze and expand stay in the state dict, unused.
    """

    def __init__(
        self, cnn_block, fusion_block, trans_block, channels, embed_dim, stride, med_blocks=(), remove_fcu=False
    ):
        super().__init__()
        self.remove_fcu = remove_fcu
        self.cnn_block = cnn_block
        self.fusion_block = fusion_block
        if med_blocks:
            self.med_block = nn.ModuleList(med_blocks)
        self.squeeze_block = FCUDown(channels, embed_dim, stride)
        self.expand_block = FCUUp(embed_dim, channels)
        self.trans_block = trans_block

    def forward(self, x, tokens, grid):
        """(N, C, H, W), (N, 1 + L, E), grid (h, w) of the L patch tokens -> the same two, one stage on."""
        x, activation = self.cnn_block(x)
        if not self.remove_fcu:
            # released code: squeeze puts the class token in front and is added, so it enters the block doubled.
            tokens = tokens + self.squeeze_block(activation, tokens[:, :1])
        tokens = self.trans_block(tokens)
        for block in getattr(self, "med_block", ()):
            x, _ = block(x)
        x, _ = self.fusion_block(x, None if self.remove_fcu else self.expand_block(tokens, grid))
        return x, tokens
