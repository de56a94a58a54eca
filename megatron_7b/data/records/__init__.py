"""Records that users write, a JSON object a line, as corpora and as samples: what fine-tuning reads.

`reading` names every mistake with file and line, `corpus` keeps what a task has made of the records beside `.bin/.idx`
files, `rows` lays them out in rows of a fixed length, kept apart in attention.
"""
