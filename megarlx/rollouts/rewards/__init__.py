"""What samples are worth: rewards, in processes that may hang or crash."""
