"""The language model: megatron-core's HybridModel behind one builder, with two interchangeable layer specs.

`sizes` and `names` are pure; `builder` is the door to everything that needs torch and megatron-core.
"""
