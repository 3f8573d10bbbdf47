"""Configuration of EMMA for transformers."""

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig


class EmmaConfig(PreTrainedConfig):
    """Configuration of a whole model.

    Args:
        text_config: Configuration of the language model, a `MambaConfig` or `Mamba2Config` of transformers, or its
            values.
        towers: Values of each vision tower, which `ViT` in modeling_emma.py documents.
        cross_scan: Whether the features are scanned in four directions before the projector.
        image_token_id: Id of the `<image>` token, which stands for one patch of the image.
        tie_word_embeddings: Whether the head shares its weight with the token embedding.
    """

    model_type = "emma"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        *,
        text_config=None,
        towers=(),
        cross_scan=False,
        image_token_id=None,
        tie_word_embeddings=True,
        **kwargs,
    ):
        values = text_config or {"model_type": "mamba2"}
        self.text_config = CONFIG_MAPPING[values["model_type"]](**values) if isinstance(values, dict) else values
        self.towers = [dict(tower) for tower in towers]
        self.cross_scan = cross_scan
        self.image_token_id = image_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
