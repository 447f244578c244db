"""The parts of a two-stream network: CNN bottleneck, squeeze (CNN -> tokens), expand (tokens -> CNN).

Shapes: N images, C channels, H x W map, L patch tokens, E embedding. The transformer block is timm's, whose parameter
names are the published ones.
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
    """timm's pre-norm block; `drop` is the dropout after the attention projection and after both MLP layers."""
    return Block(
        embed_dim, num_heads, mlp_ratio, qkv_bias=qkv_bias, proj_drop=drop, drop_path=drop_path, norm_layer=LayerNorm
    )


def fold_batchnorm(network):
    """A copy for evaluation with every BatchNorm folded into the convolution before it: the same function, faster.

    Modules list such pairs of attribute names in `conv_bn`. Other BatchNorms stay as they are.
    """
    copy = deepcopy(network).eval()
    for module in list(copy.modules()):
        for conv, norm in getattr(module, "conv_bn", ()):
            if hasattr(module, norm):
                setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                setattr(module, norm, nn.Identity())
    return copy


class _StatisticsGuard:
    """Keeps BatchNorm from updating its running statistics again while backward recomputes a forward pass.

    Backward has begun once a gradient arrives at an output of the network, and every forward pass of a module until
    the network's next one is a recomputation. A compiled graph needs no guard: it updates the statistics once.
    """

    def __init__(self, network):
        self.recomputing = False
        network.register_forward_pre_hook(self.forward_begins)
        network.register_forward_hook(self.forward_ends)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.usual_momentum = module.momentum
                module.register_forward_pre_hook(self.norm_begins)

    def forward_begins(self, _network, _inputs):
        self.recomputing = False

    def forward_ends(self, _network, _inputs, output):
        if torch.compiler.is_compiling():
            return
        for tensors in output.values() if isinstance(output, dict) else [output]:
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(self.backward_begins)

    def backward_begins(self, _gradient):
        self.recomputing = True

    def norm_begins(self, norm, _inputs):
        again = self.recomputing and not torch.compiler.is_compiling()
        norm.momentum = 0.0 if again else norm.usual_momentum
        if again:
            norm.num_batches_tracked -= 1  # the forward pass adds 1


def update_statistics_once(network):
    """Let BatchNorm update its running statistics once per step although backward recomputes activations."""
    _StatisticsGuard(network)


def recomputed(function, *inputs):
    """function(*inputs); its activations are not kept, but computed again in backward."""
    return checkpoint(function, *inputs, use_reentrant=False)


class ConvBlock(nn.Module):
    """Bottleneck: 1x1, 3x3 (strided) and 1x1 convolutions, out/4 channels in between; the last ReLU follows the sum.

    `narrow` decides where the streams exchange features: at the bottleneck (Conformer) or at full width (Semiformer).
    It selects the activation that squeeze reads and the input to which the expanded map is added. The shortcut never
    carries the expanded map. Source: Conformer (Peng et al., ICCV 2021), changed as in Semiformer's released code.

    The published code enlarges the expanded map, adds it to the input and convolves the sum. The first convolution is
    1x1 and linear, so here the expanded map is convolved while it is small and enlarged at a quarter of the width:
    the same function, without a second full-width map kept for backward.
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
        # In place where backward does not need the input, which saves large allocations.
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
    """Apply a 1x1 convolution to tokens (N, L, C) as a linear layer, without rearranging them into a map."""
    return F.linear(tokens, conv.weight.flatten(1), conv.bias)


class FCUDown(nn.Module):
    """Squeeze: a CNN map becomes an increment to the tokens.

    The published code convolves (1x1), then pools. Both are linear and pooling acts on each channel separately, so they
    commute: pooling first is the same function at 1/s^2 of the convolution's cost.
    """

    def __init__(self, in_channels, embed_dim, stride):
        super().__init__()
        self.stride = stride
        self.conv_project = nn.Conv2d(in_channels, embed_dim, 1)
        self.ln = LayerNorm(embed_dim)

    def forward(self, x, class_token):
        """(N, C, H, W), (N, 1, E) -> (N, 1 + HW/s^2, E), the class token unchanged in front."""
        x = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        x = _pointwise(self.conv_project, x.flatten(2).transpose(1, 2))  # (N, C, H/s, W/s) -> (N, L, C) -> (N, L, E)
        return torch.cat([class_token, F.gelu(self.ln(x))], dim=1)


class FCUUp(nn.Module):
    """Expand: patch tokens become a map for the CNN, one pixel per token."""

    conv_bn = (("conv_project", "bn"),)

    def __init__(self, embed_dim, out_channels):
        super().__init__()
        self.conv_project = nn.Conv2d(embed_dim, out_channels, 1)
        self.bn = BatchNorm(out_channels)

    def forward(self, tokens, grid):
        """(N, 1 + L, E), grid (h, w) with hw = L -> (N, C, h, w)."""
        x = _pointwise(self.conv_project, tokens[:, 1:])  # (N, L, E) -> (N, L, C)
        return F.relu(self.bn(x.transpose(1, 2).unflatten(2, grid)), inplace=True)


def channels_last(model):
    """Give the network's weights the memory format in which convolutions are fastest, in place; returns it.

    Not the 1x1 convolutions of squeeze and expand: their gradients are those of linear layers, and DDP warns of every
    gradient that has other strides than its weight.
    """
    model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, FCUDown | FCUUp):
            weight = module.conv_project.weight
            weight.data = weight.data.flatten().view(weight.shape)
    return model


class ConvTransBlock(nn.Module):
    """One stage of both streams and the exchange between them.

    Args:
        cnn_block, fusion_block: modules `(x, expanded=None) -> (x, activation squeeze reads)`.
        med_blocks: further CNN blocks, applied after squeeze has read the map.
        stride: pixels of the CNN map a token covers along one side.
        remove_fcu: do not exchange features; squeeze and expand stay in the state dict, unused.
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
            # released code: squeeze also returns the class token, and the sum doubles it.
            tokens = tokens + self.squeeze_block(activation, tokens[:, :1])
        tokens = self.trans_block(tokens)
        for block in getattr(self, "med_block", ()):
            x, _ = block(x)
        x, _ = self.fusion_block(x, None if self.remove_fcu else self.expand_block(tokens, grid))
        return x, tokens
