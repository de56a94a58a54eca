"""Raw text files, read in blocks of records: shared by preprocessing and preparation."""
