"""From a dataset's rows to the masked micro-batches of a step."""
