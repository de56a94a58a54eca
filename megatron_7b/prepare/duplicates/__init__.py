"""Which documents repeat others: signatures of each, then one decision over all of them."""
