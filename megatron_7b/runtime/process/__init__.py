"""Processes of a run: how they start, meet, log, stop and die."""
