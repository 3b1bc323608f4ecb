"""The words of a corpus, for perplexity by word."""

from collections import Counter
from collections.abc import Callable, Mapping

from data_pipeline.corpus.corpus import Corpus


def count_words(corpus: Corpus, group_of: Callable[[str], str]) -> Mapping[str, int]:
    """Words by group of documents: runs of bytes between ASCII white space, as `wc -w` counts in the C locale.

    Withdrawn documents are left out.
    """
    words: Counter[str] = Counter()
    withdrawn = {entry.key for entry in corpus.withdrawn}
    goes_on = False  # whether the slice before ended within a word of the same document
    for number in range(len(corpus)):
        block = corpus.read(number)
        for part in block.slices:
            if part.key in withdrawn:
                continue
            text = block.content[part.start : part.start + part.length]
            begins_within_word = part.document_offset > 0 and goes_on and not text[:1].isspace()
            words[group_of(part.key)] += len(text.split()) - begins_within_word
            goes_on = not text[-1:].isspace()
    return words
