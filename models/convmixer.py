"""Semiformer with a ConvMixer (Trockman and Kolter, 2022) as its CNN stream."""

import torch
from timm.models import generate_default_cfgs
from torch import nn
from torch.nn import functional as F

from models.blocks import ConvTransBlock, enlarged, transformer_block
from models.semiformer import HEADS, Semiformer, registered


class ConvMixerBlock(nn.Module):
    """A residual depthwise 9x9 convolution, then a pointwise convolution, each followed by GELU and BatchNorm."""

    def __init__(self, dim, kernel_size=9):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, kernel_size, groups=dim, padding="same")
        self.norm1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 1)
        self.norm2 = nn.BatchNorm2d(dim)

    def forward(self, x, expanded=None):
        """Map x, (N, C, H, W), to (output, output): the second is the activation that squeeze reads.

        If an expanded map is given, it is added to the input of the depthwise convolution but not to the shortcut.
        """
        x = self.norm1(F.gelu(self.conv1(x if expanded is None else x + enlarged(expanded, x)))) + x
        x = self.norm2(F.gelu(self.conv2(x)))
        return x, x


class SemiformerConvMixer(Semiformer):
    """The two-stream network with a ConvMixer on 8x8 patches as its CNN; the map stays at 1/8 of the image.

    The stages are 2..depth-1, so there are depth - 1 transformer blocks. Raises ValueError for `narrow` and
    `num_med_block`, which do not apply.
    """

    def __init__(self, mixer_dim=768, **kwargs):
        self.mixer_dim = mixer_dim  # before super().__init__, which calls _build_stages
        super().__init__(base_channel=mixer_dim // 4, channel_ratio=1, **kwargs)

    def _build_stages(self, width, depth, drop_path_rate, narrow, num_med_block):
        if narrow or num_med_block:
            raise ValueError("The ConvMixer variant has no bottleneck: leave out narrow and num_med_block.")
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        dim = self.mixer_dim
        self.convmix1_embed = nn.Sequential(nn.Conv2d(self.in_chans, dim, 8, stride=8), nn.GELU(), nn.BatchNorm2d(dim))
        self.conv_1 = ConvMixerBlock(dim)
        self.trans_patch_conv = nn.Conv2d(64, self.embed_dim, 4, stride=4)
        self.trans_1 = transformer_block(**self._transformer, drop_path=rates[0])
        for i in range(2, depth):
            stage = ConvTransBlock(
                ConvMixerBlock(dim),
                ConvMixerBlock(dim),
                transformer_block(**self._transformer, drop_path=rates[i - 1]),
                channels=dim,
                embed_dim=self.embed_dim,
                stride=2,
                remove_fcu=self.remove_fcu,
            )
            self.add_module(f"conv_trans_{i}", stage)

    def _first_cnn_stage(self, images, stem):
        # released code: the 7x7 stem is kept, but feeds only the patch convolution of the transformer.
        return self.conv_1(self.convmix1_embed(images))[0]


default_cfgs = generate_default_cfgs(
    {"Semiformer_convmixer_12depth": {"first_conv": ("conv1", "convmix1_embed.0"), "classifier": HEADS}}
)


@registered(SemiformerConvMixer, embed_dim=384, num_heads=6)
def Semiformer_convmixer_12depth():
    """Semiformer-S with a ConvMixer of width 768 as its CNN: 40.9 M parameters."""
