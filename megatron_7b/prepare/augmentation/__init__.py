"""Documents made from documents: rewritten, translated back and forth, joined."""
