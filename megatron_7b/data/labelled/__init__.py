"""Labelled records: texts with classes, words with tags, questions with answers; how they are checked and encoded.

Each module reads the records of one task and encodes them, with labels to learn from or without them to predict.
"""
