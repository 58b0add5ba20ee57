"""What decodes one token a row on the live weights, and which of them a stage gets.

interface.py   what a decoder is, and the check of a faster one against StageDecoder
stage.py       through the model's own layers: whatever they are, on any device
fused.py       a CPU with tensor parallelism: kernels between the matrix products
packed.py      a CPU that holds all heads: one native call a step
"""
