"""Memory and cost of a model, computed before it is built."""
