"""Storage of a corpus: a folder, a bucket or a server, with a cache."""
