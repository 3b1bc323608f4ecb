"""Preparation of corpora from sources. `data_pipeline.preparation.prepare` draws its steps."""
