"""What is asked of a document on its own: its language, its quality, its secrets, whether it is held out."""
