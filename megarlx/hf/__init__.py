"""Checkpoints of Hugging Face and of megarlx turned into each other, a slice at a time.

    families.py      which class of theirs a model is, and what that lacks
    config_map.py    config.json <-> ModelConfig
    tensor_file.py   a safetensors file read in slices
    sources.py       a folder of either kind as tensors in model space
    plan.py          which file gets what
    conversion.py    the work: shared over ranks, taken up again after a kill
    export.py        a Hugging Face folder
    trunk.py         a run directory of converted checkpoints
    verify.py        logits before and after

Nothing here is unpickled. `transformers` is needed by verify.py alone.
"""
