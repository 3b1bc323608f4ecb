"""The steps of a preparation, as `data_pipeline.preparation.prepare` draws them."""
