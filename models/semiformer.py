"""The two-stream network: Semiformer, its variant with a position embedding (PE), and Conformer are one class.

Semiformer: Weng et al., "Semi-Supervised Vision Transformers", ECCV 2022. Conformer: Peng et al., ICCV 2021.
"""

from functools import partial, wraps

import torch
from timm.layers import resample_abs_pos_embed, trunc_normal_
from timm.models import generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn
from torch.nn import functional as F

from models.blocks import ConvBlock, ConvTransBlock, recomputed, transformer_block

HEADS = ("conv_cls_head", "trans_cls_head")


def init_weights(network):
    """Initialise linear and convolution layers as published; norms and convolution biases keep PyTorch's defaults."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def head(features, num_classes, like=None):
    """Return a linear classifier, (N, features) -> (N, num_classes); as in timm, 0 classes give the identity.

    If a tensor `like` is given, the classifier has its dtype and device and is initialised as published.
    """
    layer = nn.Linear(features, num_classes) if num_classes else nn.Identity()
    if like is not None:
        init_weights(layer.to(like))
    return layer


class Semiformer(nn.Module):
    """A ViT and a CNN that exchange features in every stage but the first.

    Args:
        patch_size: side of a patch in pixels, a multiple of 16 because the CNN's last stage works at 1/16 of the image.
        in_chans: input channels.
        num_classes: classes of both heads.
        base_channel, channel_ratio: the CNN's widths are b*r, 2*b*r and 4*b*r channels for base b and ratio r.
        num_med_block: additional bottlenecks in each stage.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: settings of the transformer; depth is a multiple of 3.
        drop_rate: dropout after the attention's output projection and after both MLP layers.
        drop_path_rate: maximal stochastic depth; it grows linearly over the transformer blocks. The CNN has none.
        remove_fcu: disable the exchange between the streams (`--remove-fcu`).
        narrow: exchange at the CNN's bottleneck (Conformer) instead of at full width (Semiformer).
        pos_embed: learn a position embedding for 224 px; it is resized (bicubic) for other input sizes.
    Raises ValueError if patch_size or depth is not such a multiple, or embed_dim is not divisible by num_heads.
    """

    conv_bn = (("conv1", "bn1"),)

    def __init__(
        self,
        patch_size=16,
        in_chans=3,
        num_classes=1000,
        base_channel=64,
        channel_ratio=4,
        num_med_block=0,
        embed_dim=384,
        depth=12,
        num_heads=6,
        mlp_ratio=4.0,
        qkv_bias=True,
        drop_rate=0.0,
        drop_path_rate=0.0,
        remove_fcu=False,
        narrow=False,
        pos_embed=False,
    ):
        super().__init__()
        if patch_size % 16:
            raise ValueError(f"patch_size must be a multiple of 16, not {patch_size}.")
        if depth % 3 or depth < 3:
            raise ValueError(f"depth must be a multiple of 3, one third for each width of the CNN, not {depth}.")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} must be divisible by num_heads {num_heads}.")
        self.patch_size, self.num_classes, self.embed_dim, self.in_chans = patch_size, num_classes, embed_dim, in_chans
        self.remove_fcu, self.grad_checkpointing = remove_fcu, False
        self.num_features = base_channel * channel_ratio * 4
        self._transformer = dict(
            embed_dim=embed_dim, num_heads=num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, drop=drop_rate
        )

        # The modules are created in the order of the published state dict.
        if pos_embed:
            self.pos_embed = nn.Parameter(torch.zeros(1, (224 // patch_size) ** 2, embed_dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.trans_norm = nn.LayerNorm(embed_dim)  # released code: PyTorch's default eps here, 1e-6 everywhere else.
        self.trans_cls_head = head(embed_dim, num_classes)
        self.conv_cls_head = head(self.num_features, num_classes)
        self.conv1 = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self._build_stages(base_channel * channel_ratio, depth, drop_path_rate, narrow, num_med_block)
        init_weights(self)
        trunc_normal_(self.cls_token, std=0.02)
        if pos_embed:
            trunc_normal_(self.pos_embed, std=0.02)

    def _build_stages(self, width, depth, drop_path_rate, narrow, num_med_block):
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        patch = self.patch_size
        self.conv_1 = ConvBlock(64, width, project=True, narrow=narrow)
        self.trans_patch_conv = nn.Conv2d(64, self.embed_dim, patch // 4, stride=patch // 4)
        self.trans_1 = transformer_block(**self._transformer, drop_path=rates[0])
        for i in range(2, depth + 1):
            group, place = divmod(i - 1, depth // 3)  # groups 0, 1 and 2 work at 1/4, 1/8 and 1/16 of the image
            channels, first, last = width * 2**group, place == 0, i == depth
            cnn_block = ConvBlock(channels // 2 if first else channels, channels, 2 if first else 1, first, narrow)
            stage = ConvTransBlock(
                cnn_block,
                ConvBlock(channels, channels, 2 if last else 1, last, narrow),
                transformer_block(**self._transformer, drop_path=rates[i - 1]),
                channels=cnn_block.meeting_channels,
                embed_dim=self.embed_dim,
                stride=patch // 4 // 2**group,
                med_blocks=[ConvBlock(channels, channels) for _ in range(num_med_block)],
                remove_fcu=self.remove_fcu,
            )
            self.add_module(f"conv_trans_{i}", stage)

    def no_weight_decay(self):
        """Names of parameters that AdamW must not decay, in addition to biases and 1-d parameters."""
        return {"cls_token"}  # released code: the position embedding of the PE variant is decayed.

    def group_matcher(self, coarse=False):
        """Patterns of the layers, for timm's layer decay: the stems, stage i of both streams, norm and heads."""
        return {
            "stem": r"^(?:cls_token|pos_embed|conv1|bn1|convmix1_embed|trans_patch_conv)",
            "stages": r"^(?:conv|trans|conv_trans)_(\d+)\.",
        }

    def set_grad_checkpointing(self, enable=True):
        """Enable or disable gradient checkpointing: backward recomputes each stage from its inputs."""
        self.grad_checkpointing = enable

    def unused_parameters(self):
        """Names of parameters that never receive a gradient: those of the exchange, if `remove_fcu` is set."""
        if not self.remove_fcu:
            return []
        return [name for name, _ in self.named_parameters() if ".squeeze_block." in name or ".expand_block." in name]

    def get_classifier(self):
        """Return both heads (CNN, transformer), as timm's distilled DeiT does."""
        return self.conv_cls_head, self.trans_cls_head

    def reset_classifier(self, num_classes):
        """Replace both heads; with 0 classes the logits are the features."""
        self.num_classes = num_classes
        self.conv_cls_head = head(self.num_features, num_classes, like=self.cls_token)
        self.trans_cls_head = head(self.embed_dim, num_classes, like=self.cls_token)

    def forward(self, images, ret_feat=False):
        """Map images (N, in_chans, H, W) to [CNN logits, transformer logits], each (N, num_classes).

        With `ret_feat`, returns {"output": logits, "feat": [pooled CNN map (N, num_features), normalised class
        token (N, embed_dim)]}. Raises ValueError if H or W is not a multiple of the patch size.
        """
        features = self.forward_head(self.forward_features(images), pre_logits=True)
        logits = self._logits(features)
        return {"output": logits, "feat": features} if ret_feat else logits

    def forward_head(self, streams, pre_logits=False):
        """Map the output of `forward_features` to both heads' logits, CNN first; with `pre_logits` to their inputs."""
        x, tokens = streams
        features = [x.mean((2, 3)), tokens[:, 0]]
        return features if pre_logits else self._logits(features)

    def _logits(self, features):
        return [self.conv_cls_head(features[0]), self.trans_cls_head(features[1])]

    def forward_features(self, images):
        """Map images (N, in_chans, H, W) to a CNN map and normalised tokens, the class token first.

        The map is (N, num_features, H/32, W/32), or at 1/8 of the image for the ConvMixer; the tokens are
        (N, 1 + patches, embed_dim). Raises ValueError if H or W is not a multiple of the patch size.
        """
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"{height}x{width} images do not divide into {self.patch_size}-pixel patches: "
                f"choose an --input-size that is a multiple of {self.patch_size}."
            )
        grid = (height // self.patch_size, width // self.patch_size)
        stem = F.max_pool2d(F.relu(self.bn1(self.conv1(images)), inplace=True), 3, 2, padding=1)  # (N, 64, H/4, W/4)
        x = self._first_cnn_stage(images, stem)
        tokens = self.trans_1(self._tokens(stem, grid))
        for name, stage in self.named_children():
            if name.startswith("conv_trans_"):
                run = partial(recomputed, stage) if self.grad_checkpointing and self.training else stage
                x, tokens = run(x, tokens, grid)
        return x, self.trans_norm(tokens)

    def _first_cnn_stage(self, images, stem):
        return self.conv_1(stem)[0]

    def _tokens(self, stem, grid):
        tokens = self.trans_patch_conv(stem).flatten(2).transpose(1, 2)  # (N, E, h, w) -> (N, L, E)
        if hasattr(self, "pos_embed"):
            # ours: the published network accepts 224 px only.
            tokens = tokens + resample_abs_pos_embed(self.pos_embed, list(grid), num_prefix_tokens=0)
        # len(tokens) would turn the batch size into a constant of an exported graph.
        return torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)


# timm looks for this name in the module of a registered model. Its defaults for what is not given here are our
# evaluation view: 224 px cropped from 256 (bicubic), normalised by ImageNet's mean and standard deviation.
default_cfgs = generate_default_cfgs(
    dict.fromkeys(
        (
            *("Semiformer_small_patch16", "Semiformer_PE_small_patch16", "Semiformer_tiny_patch16"),
            *("Semiformer_micro_patch16", "Semiformer_PE_micro_patch16", "Conformer_tiny_patch16"),
            *("Conformer_small_patch16", "Conformer_small_patch32", "Conformer_base_patch16"),
        ),
        {"first_conv": "conv1", "classifier": HEADS},
    )
)


def registered(network, **settings):
    """Return a decorator that registers `network` with timm, under the name of the decorated function.

    The decorated function contributes its name and docstring only. The registered model is built with `settings`,
    which keyword arguments of `timm.create_model` override, and carries a `pretrained_cfg`. `pretrained=True` raises
    ValueError, because no weights are hosted for these names.
    """

    def register(function):
        name = function.__name__

        @wraps(function)
        def entry_point(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
            if pretrained:
                raise ValueError(
                    f"No weights are hosted for {name}: pass a checkpoint file to torch.hub.load (see hubconf.py)."
                )
            model = network(**{**settings, **kwargs})
            cfg = resolve_pretrained_cfg(name, pretrained_cfg, pretrained_cfg_overlay)
            model.pretrained_cfg = model.default_cfg = cfg.to_dict()
            return model

        return register_model(entry_point)

    return register


@registered(Semiformer, channel_ratio=4, embed_dim=384, num_heads=6)
def Semiformer_small_patch16():
    """Semiformer-S: 41.7 M parameters, 75.5 % ImageNet top-1 with 10 % of the labels."""


@registered(Semiformer, channel_ratio=4, embed_dim=384, num_heads=6, pos_embed=True)
def Semiformer_PE_small_patch16():
    """Semiformer-S with a learned position embedding."""


@registered(Semiformer, channel_ratio=1, embed_dim=192, num_heads=3)
def Semiformer_tiny_patch16():
    """Ours, for experiments: Semiformer-S with a quarter of the CNN's width and half the embedding dimension."""


@registered(Semiformer, channel_ratio=2, embed_dim=128, num_heads=2, depth=3)
def Semiformer_micro_patch16():
    """Ours, for the demo on two CPU cores: one stage for each width of the CNN."""


@registered(Semiformer, channel_ratio=2, embed_dim=128, num_heads=2, depth=3, pos_embed=True)
def Semiformer_PE_micro_patch16():
    """Ours, for the study: Semiformer_micro with a learned position embedding."""


@registered(Semiformer, channel_ratio=1, embed_dim=384, num_heads=6, narrow=True)
def Conformer_tiny_patch16():
    """Conformer-Ti: 23.5 M parameters."""


@registered(Semiformer, channel_ratio=4, embed_dim=384, num_heads=6, narrow=True)
def Conformer_small_patch16():
    """Conformer-S: 37.7 M parameters."""


@registered(Semiformer, patch_size=32, channel_ratio=4, embed_dim=384, num_heads=6, narrow=True)
def Conformer_small_patch32():
    """Conformer-S with 32-pixel patches: 38.9 M parameters."""


@registered(Semiformer, channel_ratio=6, embed_dim=576, num_heads=9, narrow=True)
def Conformer_base_patch16():
    """Conformer-B: 83.3 M parameters."""
