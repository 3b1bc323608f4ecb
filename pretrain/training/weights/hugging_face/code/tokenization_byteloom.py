"""Tokenizer of a Byteloom model for transformers: a token is a byte of the text in UTF-8."""

from typing import Any

from transformers import AddedToken, PreTrainedTokenizer

SEPARATOR = 256
PADDING = 257


class ByteloomTokenizer(PreTrainedTokenizer):
    """Tokenizer without a vocabulary file. Ids 0 to 255 are bytes, 256 separates documents, 257 pads rows.

    Text that names a special token is plain text. Bytes that are not UTF-8 pass through text by the error handler
    `surrogateescape`: `data.decode("utf-8", "surrogateescape")`.

    Args:
        bos_token: token before each text; None for models whose documents follow no separator in training.
        eos_token: the separator.
        pad_token: the padding.
        options: of PreTrainedTokenizer.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - transformers declares a list

    def __init__(
        self,
        bos_token: str | None = None,
        eos_token: str = "<|separator|>",
        pad_token: str = "<|padding|>",
        **options: Any,
    ) -> None:
        self._added_tokens_decoder = {
            SEPARATOR: AddedToken(str(eos_token), special=True, normalized=False),
            PADDING: AddedToken(str(pad_token), special=True, normalized=False),
        }
        options.setdefault("split_special_tokens", True)
        super().__init__(bos_token=bos_token, eos_token=eos_token, pad_token=pad_token, **options)

    @property
    def vocab_size(self) -> int:
        """Number of bytes."""
        return 256

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of bytes, as characters of the same number, and of the special tokens."""
        return {**{chr(byte): byte for byte in range(256)}, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [chr(byte) for byte in text.encode("utf-8", "surrogateescape")]

    def _convert_token_to_id(self, token: str) -> int | None:
        return ord(token) if len(token) == 1 and ord(token) < 256 else None

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text of tokens. Bytes that are not UTF-8 become U+FFFD."""
        special = self.added_tokens_encoder
        return b"".join(token.encode("utf-8") if token in special else bytes([ord(token)]) for token in tokens).decode(
            "utf-8", "replace"
        )

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return ids with the separator before them, if the model was trained with it."""
        before = [] if self.bos_token_id is None else [self.bos_token_id]
        return [*before, *token_ids_0, *(token_ids_1 or [])]

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """Return 1 for each special token, 0 for each byte."""
        ids = token_ids_0
        if not already_has_special_tokens:
            ids = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        return [int(each >= SEPARATOR) for each in ids]

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write nothing: there is no vocabulary file."""
        return ()
