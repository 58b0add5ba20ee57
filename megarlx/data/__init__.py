"""What training reads: token files, documents, conversations, prompts, packed batches."""
