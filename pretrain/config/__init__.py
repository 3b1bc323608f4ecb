"""The typed tree of a run: schema, loading, and checks."""
