"""What decodes one token a row on the live weights, and which of them a stage gets.

interface.py   what a decoder is, and the check of a faster one against StageDecoder
stage.py       through the model's own layers: whatever they are, on any device
in_place.py    CUDA: kernels into kept buffers, a graph a step
fused.py       a CPU with tensor parallelism: kernels between the matrix products
packed.py      a CPU that holds all heads: one native call a step
"""
