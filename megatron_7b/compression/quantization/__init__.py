"""Weights in fewer bits: folders that transformers and vLLM read, files that llama.cpp reads."""
