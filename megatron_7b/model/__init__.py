"""Models: kinds of them, a folder each, built on megatron-core from Transformer Engine's or torch-native layers.

`parameters` and `sizes` are pure; `builder` is the door to everything that needs torch and megatron-core.
"""
