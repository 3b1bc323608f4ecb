"""Config of a Byteloom model for transformers."""

from typing import Any

from transformers import PretrainedConfig


class ByteloomConfig(PretrainedConfig):
    """Config of a model of any Byteloom family.

    Args:
        byteloom: section `model` of the recipe, with all defaults.
        parameter_shapes: shape of each parameter, by its name.
        options: further fields of PretrainedConfig.
    """

    model_type = "byteloom"

    def __init__(
        self,
        byteloom: dict[str, Any] | None = None,
        parameter_shapes: dict[str, list[int]] | None = None,
        **options: Any,
    ) -> None:
        self.byteloom = byteloom or {}
        self.parameter_shapes = parameter_shapes or {}
        super().__init__(**{"vocab_size": 258, "tie_word_embeddings": False, "use_cache": False, **options})
