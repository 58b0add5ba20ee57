"""Processes: how they are launched, their groups, and what they send to each other."""
