"""Closed worlds of a few words that a policy acts in, with tasks without end."""
