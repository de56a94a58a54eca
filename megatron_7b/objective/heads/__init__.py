"""What a model with a head is trained for: classes of texts and of tokens, and where the answers to questions are."""
