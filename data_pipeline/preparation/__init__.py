"""The steps of a preparation, as `data_pipeline.prepare` draws them."""
