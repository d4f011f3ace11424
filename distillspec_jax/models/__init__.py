"""Models: shapes, layers, caches and the transformer that drafts and targets share."""
