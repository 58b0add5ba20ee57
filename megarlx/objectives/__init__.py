"""What a batch is and what its loss is: next tokens, demonstrations, policies."""
