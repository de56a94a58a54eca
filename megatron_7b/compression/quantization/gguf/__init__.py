"""Files that llama.cpp reads: its names, its order of rotated channels, its tokenizers, its blocks of few bits."""
