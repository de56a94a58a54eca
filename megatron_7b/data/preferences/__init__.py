"""Replies that people prefer, or like: the formats that they come in, and how they are encoded."""
