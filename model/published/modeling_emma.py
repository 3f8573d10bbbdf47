"""EMMA for transformers: vision towers, projector and Mamba language model.

Load the folder with `AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)`.

Axes: b batch, n patches, v channels of all towers, d width of the language model, k state size of a scan.
"""

import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from .configuration_emma import EmmaConfig

CROSS_SCAN_STATE = 16


class LayerScale(nn.Module):
    """Multiply each channel by a learned factor."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.gamma


class ViTBlock(nn.Module):
    """Transformer block with the parameter names of timm."""

    def __init__(self, *, width, num_heads, d_mlp, layer_scale, norm_eps):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width, norm_eps), nn.LayerNorm(width, norm_eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, d_mlp), "fc2": nn.Linear(d_mlp, width)})
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, x):  # [b, n, width]
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [b, heads, n, channels per head]
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.ls1(self.attn["proj"](attended))
        return x + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class ViT(nn.Module):
    """Vision transformer without final norm. Its features are the output of its last block.

    Args:
        name: Name of the tower.
        width: Number of channels.
        num_blocks: Number of blocks. The published tower has one more, which the features do not need.
        num_heads: Number of attention heads.
        d_mlp: Width of the hidden layer of each block.
        patch_px: Width and height of a patch.
        num_patches: Number of patches of an image.
        num_prefix_tokens: Number of tokens before the patches: one class token, and register tokens.
        layer_scale: Whether the blocks scale what they add to the residual stream.
        norm_eps: Epsilon of the layer norms.
        mean: Mean of each colour channel, for pixels in [0, 1].
        std: Standard deviation of each colour channel.
    """

    def __init__(self, *, name, width, num_blocks, patch_px, num_patches, num_prefix_tokens, mean, std, **block):
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.mean, self.std = mean, std  # not buffers, because `to` would round these to bf16
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_px, patch_px)})
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches, width))
        if num_prefix_tokens:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.reg_token = nn.Parameter(torch.zeros(1, num_prefix_tokens - 1, width))
        self.blocks = nn.ModuleList(ViTBlock(width=width, **block) for _ in range(num_blocks))

    def forward(self, pixels):  # [b, 3, height, width] in [0, 1] -> [b, n, channels]
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        normalised = ((pixels.float() - mean) / std).to(self.pos_embed.dtype)
        x = self.patch_embed["proj"](normalised).flatten(2).transpose(1, 2) + self.pos_embed
        if self.num_prefix_tokens:
            prefix = torch.cat([self.cls_token, self.reg_token], 1)
            x = torch.cat([prefix.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, self.num_prefix_tokens :]


class DirectedScan(nn.Module):
    """Selective scan of Mamba-1 over patches in a given order, without gate and convolution."""

    def __init__(self, width):
        super().__init__()
        self.rank = -(-width // 16)
        self.x_proj = nn.Linear(width, self.rank + 2 * CROSS_SCAN_STATE, bias=False)
        self.dt_proj = nn.Linear(self.rank, width, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(width))
        self.A_log = nn.Parameter(torch.arange(1.0, CROSS_SCAN_STATE + 1).log().repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))

    def forward(self, x):  # [b, n, v] -> [b, n, v]
        dt, B, C = self.x_proj(x).split([self.rank, CROSS_SCAN_STATE, CROSS_SCAN_STATE], -1)
        dt = F.softplus(self.dt_proj(dt).float() + self.dt_bias.float())
        decay = torch.exp(dt[..., None] * -torch.exp(self.A_log.float()))  # [b, n, v, k]
        driven = (dt * x.float())[..., None] * B.float()[:, :, None]  # [b, n, v, k]
        state, outputs = torch.zeros_like(driven[:, 0]), []
        for decay_n, driven_n, C_n in zip(decay.unbind(1), driven.unbind(1), C.float().unbind(1), strict=True):
            state = decay_n * state + driven_n
            outputs.append((state @ C_n[..., None]).squeeze(-1))
        return (torch.stack(outputs, 1) + x.float() * self.D.float()).to(x.dtype)


class CrossScan(nn.Module):
    """Scan the patches in four directions and add up the results."""

    def __init__(self, width, num_patches):
        super().__init__()
        self.grid = math.isqrt(num_patches)
        self.norm, self.out_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.scans = nn.ModuleList(DirectedScan(width) for _ in range(4))

    def forward(self, features):  # [b, n, v] -> [b, n, v]
        rows = torch.arange(self.grid**2, device=features.device)
        columns = rows.view(self.grid, self.grid).t().flatten()
        orders = (rows, columns, rows.flip(0), columns.flip(0))
        normed = self.norm(features)
        return self.out_norm(
            sum(scan(normed[:, order])[:, order.argsort()] for scan, order in zip(self.scans, orders, strict=True))
        )


class Projector(nn.Module):
    """MLP of three layers from the channels of all towers to the width of the language model."""

    def __init__(self, config):
        super().__init__()
        width, d_model = sum(tower["width"] for tower in config.towers), config.text_config.hidden_size
        self.cross_scan = CrossScan(width, config.towers[0]["num_patches"]) if config.cross_scan else None
        self.expand = nn.Linear(width, 4 * width)
        self.reduce = nn.Linear(4 * width, d_model)
        self.out = nn.Linear(d_model, d_model)

    def forward(self, features):  # [b, n, v] -> [b, n, d]
        if self.cross_scan is not None:
            features = features + self.cross_scan(features)
        return self.out(F.gelu(self.reduce(F.gelu(self.expand(features)))))


class EmmaMambaForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """EMMA: the language model reads the projected features of an image, followed by the text.

    The class name contains "Mamba" because `generate` in transformers before 5.24 looks for this word to find out that
    the model has a recurrent state instead of keys and values.
    """

    config_class = EmmaConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _is_stateful = True  # the state cannot be rolled back, so there is no assisted generation
    _no_split_modules = ["MambaBlock", "Mamba2Block", "ViTBlock"]  # noqa: RUF012
    _tied_weights_keys = {"language_model.lm_head.weight": "language_model.backbone.embeddings.weight"}  # noqa: RUF012
    # The fusion and the decoder, which only training with the alignment loss uses.
    _keys_to_ignore_on_load_unexpected = [r"^alignment\."]  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.towers = nn.ModuleDict({tower["name"]: ViT(**tower) for tower in config.towers})
        self.projector = Projector(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        parameters = inspect.signature(self.language_model.forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "cache_params"  # transformers 5.24 renamed it
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.lm_head

    def get_image_features(self, pixel_values):  # [b, 3, height, width] in [0, 1] -> [b, n, d]
        """Return the projected features of each image."""
        features = torch.cat([tower(pixel_values) for tower in self.towers.values()], -1)
        return self.projector(features.to(self.projector.out.weight.dtype))

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        inputs_embeds=None,
        labels=None,
        cache=None,
        cache_params=None,
        use_cache=None,
        logits_to_keep=0,
        output_hidden_states=None,
        return_dict=None,
        **kwargs,
    ):
        """Return the output of the language model: logits, the loss if there are labels, and the recurrent state.

        Args:
            input_ids: Token ids [b, l], with one `<image>` token for each patch.
            pixel_values: Images [number of images, 3, height, width] with values in [0, 1].
            attention_mask: 0 for padding on the left, otherwise 1; [b, l].
            labels: Targets [b, l] as for every causal language model; -100 where there is no loss.
            cache: Recurrent state, under its name in transformers 5.24 and later.
            cache_params: Recurrent state, under its older name.
        """
        if inputs_embeds is None:
            patches = input_ids == self.config.image_token_id
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(patches, 0))
            if pixel_values is not None:
                features = self.get_image_features(pixel_values).to(inputs_embeds.dtype)
                if int(patches.sum()) != features.shape[0] * features.shape[1]:
                    raise ValueError(
                        f"the text has {int(patches.sum())} <image> tokens, but the images have "
                        f"{features.shape[0] * features.shape[1]} patches; make the inputs with the processor"
                    )
                inputs_embeds = inputs_embeds.masked_scatter(patches[..., None], features)
        if inputs_embeds.shape[1] == 1:
            attention_mask = None  # a new token is not padding, but Mamba-1 would apply the whole text's mask to it
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            **{self.cache_name: cache if cache is not None else cache_params},
        )
