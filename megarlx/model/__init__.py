"""The transformer, a pipeline stage of it on each rank, and what its layers are made of."""
