"""What a checkpoint can do: suites, their results, and what they differ by from a parent's."""
