"""Config of a run: schema, loading, explanation, checks and the catalogue of recipes."""
