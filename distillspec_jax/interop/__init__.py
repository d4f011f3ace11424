"""Reading and writing the checkpoints of other libraries."""
