"""Count the words of a corpus, for perplexity per word."""

from collections import Counter
from collections.abc import Callable, Mapping

from data_pipeline.corpus.corpus import Corpus


def count_words(corpus: Corpus, group_of: Callable[[str], str]) -> Mapping[str, int]:
    """Return the number of words of each group of documents.

    Words are bytes between ASCII white space, as `wc -w` counts them in the C locale. Withdrawn documents are skipped.
    """
    words: Counter[str] = Counter()
    ends_within_word = False  # whether the previous piece ended within a word
    for piece in corpus.pieces():
        text = piece.content
        begins_within_word = piece.offset > 0 and ends_within_word and not text[:1].isspace()
        words[group_of(piece.key)] += len(text.split()) - begins_within_word
        ends_within_word = not text[-1:].isspace()
    return words
