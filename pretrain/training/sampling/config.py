"""Section `samples` of a recipe."""

from pydantic import BaseModel, Field

from byteloom.core.storage.locations import LocationText


class SamplesConfig(BaseModel, frozen=True, extra="forbid", use_attribute_docstrings=True):
    """Continuations of prompts that the model writes during training, in RUN/samples. Another process decodes them."""

    every: int = Field(default=0, ge=0)
    """Steps between samples, a multiple of checkpoint.every; 0 writes none. The weights come from checkpoints. There
    are also samples of the last step."""
    prompts: tuple[str, ...] = ()
    """Texts to continue."""
    files: tuple[LocationText, ...] = ()
    """Files to continue. Pictures and sounds are decoded as the corpus is."""
    held_out: int = Field(default=1, ge=0)
    """Documents of the first validation corpus whose beginnings are continued. A beginning is half of a picture, a
    second of sound, or 64 bytes of other documents; and at most half of the document and of the context."""
    bytes: int | None = Field(default=None, ge=1)
    """Most bytes of a continuation. Null: 256, or the rest of a picture."""
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Divisor of the logits; 0 takes the most likely byte. The draws have the same seed at every step."""
