"""The worker: one process per loaded model. It has the weights, the tokenizer and the caches; the router has none."""
