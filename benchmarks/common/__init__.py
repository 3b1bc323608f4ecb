"""Parts that several benchmarks share, and the processes that measure other libraries."""
