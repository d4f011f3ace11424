"""Text in, batches out: tasks, vocabularies and the input pipeline."""
