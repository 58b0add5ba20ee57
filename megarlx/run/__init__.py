"""A run: its folder, what its configuration becomes, and the loop around the trainer's steps."""
