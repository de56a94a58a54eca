"""Conversations to learn from: the formats that people have them in, and which of their tokens are trained."""
