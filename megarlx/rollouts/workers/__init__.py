"""A user's code in processes of its own, which may hang or crash without harm to the run."""
