"""What a training step needs and how long it takes, worked out before any GPU is asked for.

job         the model, the batch and the layout that are planned
hardware    what the data sheets of GPUs say, and what share of it was reached
memory      bytes on each rank by kind, checked against a CPU's allocator
step_time   a roofline of a training step; rollouts: of generation
search      the best few layouts
dry_run     one rank of a layout of any size, built without data, and one step of its messages
"""
