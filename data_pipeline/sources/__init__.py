"""Source files of a corpus: listing, filtering and opening."""
