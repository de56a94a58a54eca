"""A run: plan, three phases over worker processes, results that appear whole, the account at the end."""
