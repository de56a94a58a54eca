"""`report.html`: where every document went, on one page that needs nothing else."""
