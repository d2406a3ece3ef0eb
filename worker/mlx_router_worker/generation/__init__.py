"""What the text engine is made of: prompts, batches, sampling, drafts, answers."""
