"""From files to records: what is to be read, in which pieces, and every record of it as a document or a reason."""
